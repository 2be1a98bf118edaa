"""``mlx-mixtral calibrate``: what a text shows about a checkpoint, in a file that conversions use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.console import emit_json, err_console, note, one_line, out_console, print_table, seconds
from mlx_mixtral.cli.fields import argument, flag, option, takes
from mlx_mixtral.cli.options import device_option, json_flag, overwrite_flag, revision_option
from mlx_mixtral.cli.progress import share_bars
from mlx_mixtral.cli.several import refuse_in_group
from mlx_mixtral.cli.values import ModelName
from mlx_mixtral.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_mixtral_convert import CalibrationProgress

__all__ = ["calibrate"]

SHOWN = 8


@dataclass(frozen=True)
class CalibrateOptions:
    source: str = argument(type=ModelName(files=True))
    file: str = argument()
    text: tuple[Path, ...] = option(
        "--text FILE",
        "Text to measure on; repeatable.  [default: a bundled text]",
        multiple=True,
    )
    tokens: int = option("--tokens", "Tokens at most.", default=16384)
    written: str | None = option(
        "--written MODEL",
        "Measure on text that MODEL writes itself, SOURCE or a conversion of it; for `convert --rounding tuned`.",
        type=ModelName(),
    )
    sensitivities: bool = flag(
        "--sensitivities",
        "Also measure the loss of each packing of each layer, which `convert --fit` needs; takes many times as long.",
    )
    trace: str | None = option(
        "--trace FILE",
        "Recording of `mlx-mixtral routing --save-trace`: experts that it rarely chose weigh less in --sensitivities.",
    )
    restart: bool = flag("--restart", "Start over and ignore what an interrupted run left.")
    overwrite: bool = overwrite_flag("the calibration")
    revision: str | None = revision_option()
    device: str | None = device_option()
    as_json: bool = json_flag()


@contextlib.contextmanager
def _progress(*, sensitivities: bool) -> Iterator[Callable[[CalibrationProgress], None]]:
    """What it will take, then a bar, or without a terminal a line for each layer."""
    last = -1

    def lines(at: CalibrationProgress) -> None:
        nonlocal last
        if at.layer == last:
            return
        left = f"about {seconds(at.seconds_left)} left"
        if last >= 0:
            note(f"calibrate: layer {at.layer}/{at.layers}, {left}")
        elif at.layer:
            note(f"calibrate: continuing after layer {at.layer}/{at.layers}, {left}")
        else:
            note(f"calibrate: {left}" + ", most of it for --sensitivities" * sensitivities)
        last = at.layer

    if not err_console().is_terminal:
        yield lines
        return
    with share_bars() as bar:
        task = bar.add_task("calibrate", total=1.0)

        def show(at: CalibrationProgress) -> None:
            if last < 0:
                lines(at)
            where = f"layer {at.layer + 1}/{at.layers}" if at.layer < at.layers else "output head"
            bar.update(task, description=f"calibrate: {where}", completed=at.share, seconds_left=at.seconds_left)

        yield show


@click.command()
@takes(CalibrateOptions)
def calibrate(given: CalibrateOptions) -> None:
    """Run a text through SOURCE and save measurements to FILE, for `convert --calibration FILE`.

    Only one layer is in memory at a time. The bundled text has several languages and code.

    This is all that `convert --rounding` needs. `convert --fit` also needs --sensitivities, for which every matrix is packed
    in thirteen ways; an estimate of the time is printed first.

    --written takes a model that fits in memory, and it writes --tokens tokens of its own, from nothing: as much as you want, in
    the languages and on the subjects that it knows. `convert --rounding tuned` needs that much.

    An interrupted run resumes after the last layer in FILE.journal: repeat the same command.

    --trace takes a routing trace of SOURCE, or of a conversion of it, on text like yours. The loss of a layer's experts is
    then averaged by how often that text chose each of them, and `convert --fit` spends its bits accordingly.
    """
    refuse_in_group("calibrate", "run it on one, without mlx.launch")
    import time

    from mlx_mixtral.cli.destinations import ask_to_replace
    from mlx_mixtral_convert import calibrate as run
    from mlx_mixtral_convert.calibration import check_place

    if given.trace is not None and not given.sensitivities:
        raise click.UsageError("--trace only affects sensitivities; add --sensitivities, or leave out --trace")
    if given.written is not None and given.text:
        raise click.UsageError("give --text, or let a model write with --written, not both")
    if not given.file:
        raise InvalidRequestError("the file to write has an empty name; give one")
    ask_to_replace(check_place(given.file, given.source or None), overwrite=given.overwrite)
    started = time.perf_counter()
    with _progress(sensitivities=given.sensitivities) as progress:
        found = run(
            given.source,
            given.text,
            tokens=given.tokens,
            written=given.written,
            sensitivities=given.sensitivities,
            trace=given.trace,
            save=given.file,
            restart=given.restart,
            revision=given.revision,
            progress=progress,
        )
    took = time.perf_counter() - started
    costs = sorted(
        ((loss["4-bit g64"], name) for name, loss in found.losses.items() if "4-bit g64" in loss), reverse=True
    )
    if given.as_json:
        emit_json(
            {
                "file": given.file,
                "tokens": int(found.tokens.size),
                "seconds": took,
                "losses": found.losses,
                "anchors": found.anchors,
            }
        )
        return
    out_console().print(f"{one_line(given.file)}: {found.tokens.size} tokens, {seconds(took)}", soft_wrap=True)
    if costs:
        rows = [[name, f"{loss:.4f}"] for loss, name in costs[:SHOWN]]
        print_table("Most sensitive", ["matrices", "loss at 4 bits, nats per token"], rows)
