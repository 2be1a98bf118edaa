"""A conversion while it runs and when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mixtral.cli.console import err_console, note, one_line, out_console, print_table, seconds
from mlx_mixtral.cli.progress import byte_bars
from mlx_mixtral.info.estimate import PART_NAMES
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral_convert import Progress

__all__ = ["conversion_progress", "print_conversion", "print_export"]

# Without a terminal a line is written this often at most: enough for a log of an hour's work.
PLAIN_LINES_EVERY_S = 15.0
WORST_SHOWN = 5
# Roundings that work through a layer before they write any of it.
LAYER_BY_LAYER = ("gptq", "tuned")


@contextlib.contextmanager
def conversion_progress(rounding: str = "plain") -> Iterator[Callable[[Progress], None]]:
    """A callback for ``convert``: a bar with bytes per second and remaining time, or now and then a plain line."""
    if not err_console().is_terminal:
        yield _plain_lines()
        return
    with byte_bars() as bar:
        tasks: dict[str, Any] = {}

        def show(at: Progress) -> None:
            if at.stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                own_pace = {"seconds_left": None} if at.stage == "convert" and rounding in LAYER_BY_LAYER else {}
                tasks[at.stage] = bar.add_task(at.stage, total=None, **own_pace)
            label = f"{at.stage} layer {at.layer + 1}/{at.layers}" if at.layer is not None and at.layers else at.stage
            left = {} if at.seconds_left is None else {"seconds_left": at.seconds_left}
            bar.update(tasks[at.stage], description=label, completed=at.done_bytes, total=at.total_bytes, **left)

        yield show


def _plain_lines() -> Callable[[Progress], None]:
    last = time.monotonic()

    def show(at: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_LINES_EVERY_S or not at.total_bytes:
            return
        last = now
        share = 100 * at.done_bytes // at.total_bytes
        left = "" if at.seconds_left is None else f", about {seconds(at.seconds_left)} left"
        note(f"{at.stage}: {share}% of {format_bytes(at.total_bytes)}{left}")

    return show


def _print_packings(packings: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for entry in packings:
        error = "" if entry["relative_rms"] is None else f"{entry['relative_rms']:.3%}"
        rows.append([one_line(entry["type_name"]), entry["spec"], str(entry["matrices"]), entry["how"], error])
    print_table("Packing kept", ["source", "packed as", "matrices", "", "largest relative error"], rows, left=2)


def print_conversion(source: str, dest: Path, report: Mapping[str, Any]) -> None:
    """Sizes, bits by part, the largest errors, time and memory, and what to type next."""
    console = out_console()
    _print_title(dest, report)
    line = _sizes(report)
    for adapter in report["adapters"]:
        line += f"\nfused: {_adapter(adapter)}"
    if report["predicted_kl"] is not None:
        line += f"\n{_expected_loss(report)}"
    if report["dry_run"]:
        expected = "" if report["expected_seconds"] is None else f"about {seconds(report['expected_seconds'])}, "
        expected += f"up to {format_bytes(report['expected_memory_bytes'])} of memory"
        console.print(f"{line}\n{_disk(report)}; {expected}\n", soft_wrap=True)
    else:
        resumed = f", {report['resumed_layers']} of {report['layers']} layers kept from an earlier run" * bool(
            report["resumed_layers"]
        )
        console.print(f"{line}\n{_cost(report)}{resumed}\n")
    print_table(
        "",
        ["part", "bits per weight", "bytes"],
        [
            [PART_NAMES.get(part, part), f"{size['bits']:.2f}", format_bytes(size["bytes"])]
            for part, size in report["sizes_by_part"].items()
        ],
    )
    if report["packings"]:
        _print_packings(report["packings"])
        if report["output_bytes"] > 1.02 * report["source_bytes"]:
            console.print(
                "This is larger than the source because MLX has a scale and bias for every 32 weights. Use "
                "--bits without --exact to requantise.\n",
                soft_wrap=True,
            )
    elif report["worst"]:
        on_purpose = report["rounding"] in LAYER_BY_LAYER
        print_table(
            "Farthest from the source's weights" if on_purpose else "Largest quantisation errors",
            ["matrix", "packed as", "relative error"],
            [
                [one_line(entry["path"]).removeprefix("model."), entry["spec"], f"{entry['relative_rms']:.2%}"]
                for entry in report["worst"][:WORST_SHOWN]
            ],
            left=2,
        )
        if on_purpose:
            console.print("o_proj and down_proj differ on purpose: they make up for what was lost before them.\n")
    if report["dry_run"]:
        _print_missing_disk(report)
    else:
        name = one_line(dest)
        shown = f"'{name}'" if " " in name else name
        talks = "instruct" in source.lower()
        example = f"chat {shown}" if talks else f'generate {shown} -p "Once upon a time"'
        console.print(f"Next: mlx-mixtral {example}", soft_wrap=True)


def _adapter(adapter: Mapping[str, Any]) -> str:
    rank = f", rank {adapter['rank']}" if adapter["rank"] else ""
    count = "1 tensor" if adapter["matrices"] == 1 else f"{adapter['matrices']} tensors"
    return f"{one_line(adapter['name'])} ({adapter['kind']}, scale {adapter['scale']:g}{rank}) into {count}"


def _expected_loss(report: Mapping[str, Any]) -> str:
    expected, error = report["predicted_kl"], report["predicted_kl_error"]
    if error is None:
        return (
            f"expected loss: about {expected:.2g} nats per token, a guess; use calibrate --sensitivities to measure this "
            "model"
        )
    return f"expected loss: {expected:.2g} ± {error:.1g} nats per token, on text like the calibration's"


def print_export(dest: Path, report: Mapping[str, Any]) -> None:
    """Sizes, the type of the weights, time and memory."""
    console = out_console()
    _print_title(dest, report)
    console.print(_sizes(report))
    if report["dry_run"]:
        console.print(_disk(report))
        _print_missing_disk(report)
        return
    if report["packed_matrices"] and report["format"] == "gguf":
        exact = f"{report['exact_matrices']} of {report['packed_matrices']}"
        console.print(f"{exact} quantised matrices carried over exactly")
    console.print(_cost(report))


def _print_title(dest: Path, report: Mapping[str, Any]) -> None:
    planned = " (dry run: nothing was written)" if report["dry_run"] else ""
    out_console().print(f"{one_line(dest)}{planned}", style="bold", soft_wrap=True)


def _sizes(report: Mapping[str, Any]) -> str:
    kind = f", {report['type']}" if "type" in report else ""
    sizes = f"{format_bytes(report['source_bytes'])} -> {format_bytes(report['output_bytes'])}"
    return f"{sizes}{kind}, {report['bits_per_weight']:.2f} bits per weight"


def _cost(report: Mapping[str, Any]) -> str:
    return f"{seconds(report['seconds'])}, peak memory {format_bytes(report['peak_memory_bytes'])}"


def _disk(report: Mapping[str, Any]) -> str:
    return f"{format_bytes(report['disk_needed_bytes'])} of disk space needed, {format_bytes(report['disk_free_bytes'])} free"


def _print_missing_disk(report: Mapping[str, Any]) -> None:
    if (missing := report["disk_needed_bytes"] - report["disk_free_bytes"]) > 0:
        out_console().print(
            f"A real run would be refused for lack of disk space: {format_bytes(missing)} more is needed.",
            soft_wrap=True,
        )
