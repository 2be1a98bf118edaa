"""``mlx-mixtral calibrate``: what a text shows about a checkpoint, in a file that conversions use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from mlx_mixtral.cli.console import emit_json, note, one_line, out_console, print_table, seconds
from mlx_mixtral.cli.fields import argument, option, takes
from mlx_mixtral.cli.options import device_option, json_flag, overwrite_flag, revision_option
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["calibrate"]

SHOWN = 8


@dataclass(frozen=True)
class CalibrateOptions:
    source: str = argument()
    file: str = argument()
    text: tuple[Path, ...] = option(
        "--text FILE", "Text to measure on; repeatable.", type=click.Path(path_type=Path), multiple=True
    )
    tokens: int = option("--tokens", "Tokens at most.", default=16384)
    sensitivities: bool = option(
        "--sensitivities/--no-sensitivities",
        "Also measure what each packing costs, for --fit.",
        default=True,
        show_default=False,
    )
    trace: str | None = option(
        "--trace FILE",
        "What `mlx-mixtral routing --save-trace` recorded: experts rarely chosen there count less in sensitivities.",
    )
    overwrite: bool = overwrite_flag("the calibration")
    revision: str | None = revision_option()
    device: str | None = device_option()
    as_json: bool = json_flag()


@click.command()
@takes(CalibrateOptions)
def calibrate(given: CalibrateOptions) -> None:
    """Pass a text through SOURCE and save to FILE what `convert --calibration FILE` uses.

    One layer is in memory at a time. Without --text a bundled text in several languages and code is used.

    With --trace, a routing trace of SOURCE or of a conversion of it on text like yours, what packing the experts of a layer
    costs is the mean over its experts weighted by how often that text chose them, and `convert --fit` spends its bits so.
    """
    import time

    from mlx_mixtral.cli.destinations import ask_to_replace
    from mlx_mixtral_convert import calibrate as run
    from mlx_mixtral_convert.calibration import check_place

    if given.trace is not None and not given.sensitivities:
        raise click.UsageError("--trace weighs sensitivities; leave out --no-sensitivities or --trace")
    if not given.file:
        raise InvalidRequestError("the file to write is an empty name; give one")
    ask_to_replace(check_place(given.file, given.source or None), overwrite=given.overwrite)
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        note(f"calibrate: layer {done}/{total}")
        if done == total and given.sensitivities:
            note("calibrate: sensitivities")

    found = run(
        given.source,
        given.text,
        tokens=given.tokens,
        sensitivities=given.sensitivities,
        trace=given.trace,
        revision=given.revision,
        progress=progress,
    )
    found.save(given.file)
    took = time.perf_counter() - started
    costs = sorted(
        ((loss["4-bit g64"], name) for name, loss in found.losses.items() if "4-bit g64" in loss), reverse=True
    )
    if given.as_json:
        emit_json({"file": given.file, "tokens": int(found.tokens.size), "seconds": took, "losses": found.losses})
        return
    out_console().print(f"{one_line(given.file)}: {found.tokens.size} tokens, {seconds(took)}", soft_wrap=True)
    if costs:
        rows = [[name, f"{loss:.4f}"] for loss, name in costs[:SHOWN]]
        print_table("Most sensitive", ["matrices", "loss at 4 bits, nats a token"], rows)
