"""``info --machines`` as tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.cli.console import figures, one_line, out_console, plural, print_table
from mlx_mixtral.sizes import format_bytes

__all__ = ["print_machines"]

# Sizes that differ by less are shown as one.
ALIKE = 0.02


def print_machines(found: Mapping[str, Any], model: str) -> None:
    """What each machine would hold, and a row for each plan."""
    console, plans = out_console(), found["plans"]
    console.print(f"{one_line(model)} on {len(found['machines'])} machines", style="bold", soft_wrap=True)
    console.print("A prediction from published figures: no Mac was measured.\n", soft_wrap=True)
    if len(plans) == 1:
        _print_held(found["machines"], plans[0])
    else:
        _print_shares(found["machines"], plans)
    columns = ["", "one machine", "layers", "layers tok/s", "experts", "experts tok/s", "auto"]
    rows = [
        [
            plan["model"],
            _alone(plan["one_machine"]),
            *_cells(plan, "layers"),
            *_cells(plan, "experts"),
            plan["auto"] or "-",
        ]
        for plan in plans
    ]
    print_table("Bytes on a machine, predicted tok/s (-: does not fit; *: experts read from disk)", columns, rows)
    for problem in dict.fromkeys(split["problem"] for plan in plans for split in plan["splits"].values()):
        if problem:
            console.print(one_line(problem), soft_wrap=True)
    _print_assumptions(found)


def _print_held(machines: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> None:
    """Every machine's bytes, for one model."""
    rows = []
    for split, found in plan["splits"].items():
        for rank, (machine, held) in enumerate(zip(machines, found["machines"], strict=False)):
            share = plural(held["layers"], "layer") if split == "layers" else f"width {held['expert_width']:,}"
            sizes = [format_bytes(held[name]) for name in ("weight_bytes", "kv_bytes", "working_bytes", "usable_bytes")]
            fits = "yes" if held["fits"] else "no"
            rows.append([split, f"{rank}: {machine['memory_gib']} GB", share, *sizes, fits])
    columns = ["split", "machine", "share", "weights", "KV", "working", "usable", "fits"]
    print_table("What each machine holds", columns, rows, left=3)


def _print_shares(machines: Sequence[Mapping[str, Any]], plans: Sequence[Mapping[str, Any]]) -> None:
    """What each machine's share is: for published sizes, where it hardly depends on the bits."""
    four = next((plan for plan in plans if plan["model"] == "4-bit"), plans[0])["splits"]
    rows = []
    for rank, machine in enumerate(machines):
        shares = [
            f"{four[split]['machines'][rank][name]:,}" if four[split]["machines"] else "-"
            for split, name in (("layers", "layers"), ("experts", "expert_width"))
        ]
        rows.append([f"{rank}: {machine['memory_gib']} GB", format_bytes(machine["usable_bytes"]), *shares])
    print_table("Shares at 4 bits", ["machine", "for the GPU", "layers", "or expert width"], rows)


def _alone(plan: Mapping[str, Any]) -> str:
    if plan["predicted_tok_s"] is None:
        return "-"
    return figures(plan["predicted_tok_s"]) + ("*" if plan["streams"] else "")


def _cells(plan: Mapping[str, Any], split: str) -> tuple[str, str]:
    """Bytes on the fullest machine and, where that is another size, on the emptiest; tokens per second."""
    found = plan["splits"][split]
    if not found["machines"]:
        return "-", "-"
    sizes = [machine["bytes"] for machine in found["machines"]]
    held, least = format_bytes(max(sizes)), format_bytes(min(sizes))
    if min(sizes) < (1 - ALIKE) * max(sizes):
        held = f"{least.split(' ')[0] if least[-2:] == held[-2:] else least}-{held}"
    return held, figures(found["predicted_tok_s"]) if found["fits"] else "-"


def _print_assumptions(found: Mapping[str, Any]) -> None:
    count, collective_ms = len(found["machines"]), found["collective_s"] * 1e3
    out_console().print(
        f"All machines have {found['chip'] if found['chip'].startswith('a ') else 'an ' + found['chip']}, of whose "
        f"{found['bandwidth_gb_s']:g} GB/s decoding reads {found['bandwidth_share']:.0%}; disks read "
        f"{format_bytes(found['disk_bytes_per_s'])}/s.\n"
        f"Link: {found['over']}; {collective_ms:.2g} ms for a sum over {count} machines.\n"
        f"Source: {found['source']}.\n"
        "auto is the faster split of those that fit. Bytes of a split are those of a machine with KV cache and working memory.",
        style="dim",
        soft_wrap=True,
    )
