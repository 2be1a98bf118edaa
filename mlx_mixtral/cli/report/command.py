"""``mlx-mixtral report``: the quick evaluations of a model as a section for its model card."""

from __future__ import annotations

import shlex

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import takes
from mlx_mixtral.cli.report.options import ReportOptions
from mlx_mixtral.cli.several import refuse_in_group

__all__ = ["report"]

TYPED = "mlx_mixtral.cli.report.command.typed"


class _Remembered(click.Command):
    """A command that knows its arguments as they were typed: a report says how to make it again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = shlex.join(["mlx-mixtral", str(self.name), *args])
        return super().parse_args(ctx, args)


@click.command(cls=_Remembered)
@click.pass_context
@takes(ReportOptions)
def report(ctx: click.Context, given: ReportOptions) -> None:
    """Measure MODEL and write a folder with README-section.md and plots, for publication in its model card.

    The report describes the checkpoint and its size, its perplexity by domain and by length of context, the passkeys it
    finds, its routing next to the paper's figures, the memory it needs, and the command that repeats the measurements.
    --reference adds its distance to another model. What does not apply to MODEL is left out, with the reason.

    Of the texts, the report contains only the names of their domains and the paths given on the command line. The folder
    appears complete or not at all.
    """
    refuse_in_group("report", "run it on one, without mlx.launch")
    from mlx_mixtral.cli.report.job import ReportJob

    job = ReportJob(given, ctx.meta[TYPED])
    found = job.run()
    if given.as_json:
        emit_json(found)
    else:
        job.report()
