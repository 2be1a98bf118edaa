"""``mlx-mixtral verify``: is a converted folder still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.console import emit_json, err_console, one_line, out_console, print_table, seconds
from mlx_mixtral.cli.options import json_option
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral_convert import VerifyReport

__all__ = ["verify"]


@click.command(short_help="Check a converted folder: hashes, shapes, finiteness.")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@click.pass_context
def verify(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Check that FOLDER is what `convert` wrote: size and sha256 of every file, shapes, and no NaN or infinity.

    Exit status 1 if anything is wrong.
    """
    report = _run(folder)
    if as_json:
        emit_json(report.to_dict())
    elif report.ok:
        checked = f"{report.files} files ({format_bytes(report.hashed_bytes)}) and {report.tensors} tensors"
        out_console().print(f"{one_line(folder)}: {checked} are as written, {seconds(report.seconds)}", soft_wrap=True)
    else:
        rows = [[one_line(problem.what), one_line(problem.problem)] for problem in report.problems]
        print_table(
            f"{one_line(folder)}: {len(rows)} problem{'s' * (len(rows) > 1)}", ["what", "problem"], rows, left=2
        )
    ctx.exit(0 if report.ok else 1)


def _run(folder: Path) -> VerifyReport:
    from mlx_mixtral_convert import verify as run

    if not err_console().is_terminal:
        return run(folder)
    from mlx_mixtral.cli.progress import byte_progress

    with byte_progress() as bar:
        task = bar.add_task("verifying", total=None)
        return run(folder, progress=lambda done, total: bar.update(task, completed=done, total=total))
