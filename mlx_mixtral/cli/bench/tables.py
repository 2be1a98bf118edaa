"""What ``bench`` found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.bench.measurements import OURS
from mlx_mixtral.cli.adapters import AdapterFacts
from mlx_mixtral.cli.console import figures, one_line, out_console, print_table, seconds, terminal_safe
from mlx_mixtral.sizes import format_bytes

__all__ = ["print_bench"]

# Key of the section and of a row's size; title; heading of the size.
SECTIONS = (
    ("prefill", "prompt_tokens", "Prefill, tok/s", "prompt"),
    ("decode", "depth_tokens", "Decode, tok/s", "context"),
    ("batch", "rows", "Batches, tok/s of all rows together", "rows"),
)


def print_bench(found: Mapping[str, Any]) -> None:
    """Print the result of ``bench --json`` for people."""
    console, device, adapter = out_console(), found["device"], found["adapter"]
    used = "" if adapter is None else f" with {AdapterFacts(**adapter).title}"
    console.print(
        terminal_safe(
            f"{found['model']}{used} on {device['name']} ({device['kind']}), computing in {found['compute_dtype']}"
        ),
        style="bold",
        soft_wrap=True,
    )
    if device["kind"] == "cpu":
        console.print(f"{OURS} computes {found['products']}", soft_wrap=True)
    for side, load in found["load"].items():
        label = f"{side} {found['versions'].get(side.split()[0], '')}".strip()
        console.print(f"{label}: {format_bytes(load['weight_bytes'])} of weights, loaded in {seconds(load['seconds'])}")
    if (peak := found["peak_memory_bytes"]) is not None:
        console.print(f"peak memory {format_bytes(peak)}")
    if not found["sides_in_turn"]:
        console.print(
            "There is not enough memory for all programs at once: each was measured after the previous one was closed."
        )
    others = [side for side in found["load"] if side != OURS]
    console.print(f"Medians of {found['repeats']} measurements, with their minimum and maximum\n")
    for key, size, title, heading in SECTIONS:
        if rows := found[key]:
            columns, cells = _table(key, size, heading, rows, others)
            print_table(title, columns, cells, left=2 if others else 1)
    for side, reason in _reasons(found):
        console.print(terminal_safe(f"- {side}: {one_line(reason)}"), soft_wrap=True)
    if (copy := found["copy_bytes_per_s"]) is not None and found["decode"]:
        _print_traffic(found["decode"], copy)
    if (group := found["group"]) is not None:
        _print_sums(group, [row["share_of_sums"] for row in found["decode"] if row["share_of_sums"] is not None])
    _print_published(found["published"])


def _table(
    key: str, size: str, heading: str, rows: Sequence[Mapping[str, Any]], others: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """A line for every side of a row, ours first."""
    own = ["first token"] if key == "prefill" else []
    columns = [
        heading,
        *(["runtime"] if others else []),
        "tok/s",
        "min..max",
        *own,
        *(["speedup"] if others else []),
    ]
    cells = []
    for row in rows:
        for side in (OURS, *others):
            cell = [
                f"{row[size]:,}" if side == OURS else "",
                *([side] if others else []),
                *_rate(row["sides"].get(side)),
            ]
            if key == "prefill":
                first = row["sides"].get(side, {}).get("time_to_first_token_s")
                cell.append("" if first is None else _short(first["median"]))
            if others:
                ratio = row["ratios"].get(side)
                cell.append("" if ratio is None else f"{ratio:.2f}x")
            cells.append(cell)
    return columns, cells


def _print_traffic(rows: Sequence[Mapping[str, Any]], copy: Mapping[str, float]) -> None:
    """What decoding makes memory deliver, and the disk where experts are streamed."""
    cells = []
    for row in rows:
        ours = row["sides"].get(OURS, {})
        if row["bytes_per_s"] is not None:
            cell = [
                f"{row['depth_tokens']:,}",
                format_bytes(row["bytes_per_token"]),
                f"{format_bytes(row['bytes_per_s'])}/s",
            ]
            cell.append(f"{row['share_of_copy']:.0%}")
            if (read := ours.get("read_bytes_per_token")) is not None:
                cell.append(format_bytes(read))
            cells.append(cell)
    columns = ["context", "bytes per token", "decode", "of copy rate", "from disk"][: len(cells[0]) if cells else 4]
    spread = f"{format_bytes(copy['min'])}..{format_bytes(copy['max'])}"
    title = f"Decode and memory, which copies {format_bytes(copy['median'])}/s ({spread}, read and written)"
    print_table(title, columns, cells)


def _print_sums(group: Mapping[str, Any], shares: Sequence[float]) -> None:
    """What a token waits for the other machines."""
    line = (
        f"{group['machines']} machines, split by {group['split']}: a token waits for {group['sums_per_token']} sums, "
        f"which take {group['sums_s_per_token'] * 1e3:.2f} ms by themselves"
    )
    if shares:
        low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
        line += f", {low if low == high else f'{low} to {high}'} of the time of decoding"
    out_console().print(line, soft_wrap=True)


def _rate(side: Mapping[str, Any] | None) -> tuple[str, str]:
    if side is None or "tok_s" not in side:
        return ("" if side is None else "-"), ""
    spread = side["tok_s"]
    return figures(spread["median"]), f"{figures(spread['min'])}..{figures(spread['max'])}"


def _reasons(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Why sides have no figure somewhere, each reason once."""
    reasons = [
        (side, result["not_measured"])
        for key, *_ in SECTIONS
        for row in found[key]
        for side, result in row["sides"].items()
        if "not_measured" in result
    ]
    return list(dict.fromkeys(reasons))


def _short(duration: float) -> str:
    return f"{1000 * duration:.0f} ms" if duration < 1 else seconds(duration)


def _print_published(published: Mapping[str, Any]) -> None:
    console = out_console()
    for chip in published["bandwidths"]:
        console.print(
            f"published memory bandwidth of {chip['name']}: {chip['bandwidth_gb_s']:g} GB/s ({chip['source']})"
        )
    if published["decode_8x7b"]:
        rows = [
            [entry["machine"], entry["runtime"], figures(entry["decode_tok_s"]), entry["source"]]
            for entry in published["decode_8x7b"]
        ]
        print_table(
            "Published for Mixtral 8x7B on machines of this class",
            ["machine", "runtime", "decode tok/s", "source"],
            rows,
            left=2,
        )
