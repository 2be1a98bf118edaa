"""``mlx-mixtral report``: the quick evaluations of a model as a section for its model card."""

from __future__ import annotations

import shlex
from typing import Any

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.options import json_option, loading_options, number_list

__all__ = ["report"]

LENGTHS = number_list(int, "numbers", "1024,2048")
DEPTHS = number_list(float, "numbers", "0,0.5,1")
TYPED = "mlx_mixtral.cli.report.command.typed"


class _Remembered(click.Command):
    """A command that knows its arguments as they were typed: a report says how to make it again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = shlex.join(["mlx-mixtral", str(self.name), *args])
        return super().parse_args(ctx, args)


@click.command(cls=_Remembered, short_help="Measure a model for its model card: Markdown and plots.")
@click.argument("model")
@click.option("--reference", metavar="OTHER", help="Compare with this model, or a file `evaluate` saved.")
@click.option(
    "--text", "texts", multiple=True, metavar="PATH",
    help="File, folder or .jsonl, or DOMAIN=PATH; repeatable.  [default: the text bundled for calibration]",
)  # fmt: skip
@click.option("--text-field", default="text", show_default=True, metavar="KEY", help="Key of the text in JSONL.")
@click.option("--domain-field", default="domain", show_default=True, metavar="KEY", help="Key of its domain.")
@click.option("--quick", is_flag=True, help="Less text, fewer and shorter passkey prompts.")
@click.option(
    "--max-bytes", type=int, metavar="N",
    help="Only this much of the start of each text.  [default: 32768; --quick: 4096]",
)  # fmt: skip
@click.option("--window", type=int, metavar="N", help="Tokens read at once.  [default: the context, at most 2048]")
@click.option(
    "--lengths", callback=LENGTHS, metavar="LIST",
    help="Of passkey prompts, in tokens.  [default: 512 to 4096 as the context allows; --quick: to 1024]",
)  # fmt: skip
@click.option(
    "--depths", callback=DEPTHS, metavar="LIST",
    help="Where the key stands.  [default: 0,0.25,0.5,0.75,1; --quick: 0,0.5,1]",
)  # fmt: skip
@click.option("--trials", type=int, default=1, show_default=True, help="Prompts of each length and depth.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of keys and filler text.")
@click.option("--output", metavar="FOLDER", help="The folder to make.  [default: the model's name and -report]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier report in FOLDER.")
@click.option("--no-plots", is_flag=True, help="Markdown alone.")
@loading_options
@json_option
@click.pass_context
def report(ctx: click.Context, /, model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL and write a folder with README-section.md and plots, to be published in its model card.

    It says what the checkpoint is and weighs, its perplexity by domain and by length of context, with --reference its
    distance to another model, which passkeys it finds, what its experts do beside the paper's figures, the memory it
    needs, and the command that measures all this again. What does not apply to MODEL is left out with the reason.

    Nothing of the texts is written but the names of their domains, and paths as they are typed in the command. The folder
    appears complete or not at all.
    """
    from mlx_mixtral.cli.report.job import ReportJob

    job = ReportJob(model, command=ctx.meta[TYPED], **options)
    found = job.run()
    if as_json:
        emit_json(found)
    else:
        job.report()
