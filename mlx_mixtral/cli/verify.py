"""``mlx-mixtral verify``: is a converted folder still what was written?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from mlx_mixtral.cli.console import emit_json, one_line, out_console, plural, print_table, seconds
from mlx_mixtral.cli.fields import argument, takes
from mlx_mixtral.cli.options import json_flag
from mlx_mixtral.cli.values import Place
from mlx_mixtral.sizes import format_bytes

__all__ = ["verify"]


@dataclass(frozen=True)
class VerifyOptions:
    folder: Path = argument(type=Place("dir", as_text=False))
    as_json: bool = json_flag()


@click.command()
@click.pass_context
@takes(VerifyOptions)
def verify(ctx: click.Context, given: VerifyOptions) -> None:
    """Check that FOLDER is what `convert` wrote: size and sha256 of every file, shapes, and no NaN or infinity.

    Exit status 1 if anything is wrong.
    """
    from mlx_mixtral.cli.progress import byte_progress
    from mlx_mixtral_convert import verify as run

    with byte_progress("verifying") as show:
        report = run(given.folder, progress=show)
    name = one_line(given.folder)
    if given.as_json:
        emit_json(report.to_dict())
    elif report.ok:
        checked = f"{report.files} files ({format_bytes(report.hashed_bytes)}) and {report.tensors} tensors"
        out_console().print(f"{name}: {checked} are as written, {seconds(report.seconds)}", soft_wrap=True)
    else:
        rows = [[one_line(problem.what), one_line(problem.problem)] for problem in report.problems]
        found = (
            f"{plural(len(rows), 'file')} changed, weights as written"
            if report.weights_ok
            else plural(len(rows), "problem")
        )
        print_table(f"{name}: {found}", ["what", "problem"], rows, left=2)
    ctx.exit(0 if report.ok else 1)
