"""``mlx-mixtral routing``: what a model's experts do, by domain, as in section 5 of the paper."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.options import json_option, loading_options, number_list

__all__ = ["routing"]

LAYERS = number_list(int, "layers", "0,15,31")


@click.command(short_help="What a model's experts do, by domain.")
@click.argument("model", required=False)
@click.option(
    "--text", "texts", multiple=True, metavar="PATH", help="File, folder or .jsonl, or DOMAIN=PATH; repeatable."
)
@click.option("--trace", metavar="FILE", help="Analyse what --save-trace wrote; no model is needed.")
@click.option("--text-field", default="text", show_default=True, metavar="KEY", help="Key of the text in JSONL.")
@click.option("--domain-field", default="domain", show_default=True, metavar="KEY", help="Key of its domain.")
@click.option("--max-tokens", type=int, metavar="N", help="Of each domain, from its beginning.  [default: all]")
@click.option("--window", type=int, metavar="N", help="Tokens read at once.  [default: the context, at most 2048]")
@click.option(
    "--layers",
    callback=LAYERS,
    metavar="LIST",
    help="Layers to show one by one.  [default: first,middle,last]",
)
@click.option(
    "--sample", type=int, metavar="N", help="Tokens of each domain to colour; 0 for none.  [default: 48, HTML 240]"
)
@click.option("--no-text", is_flag=True, help="Keep no text: not in the trace, and none is coloured.")
@click.option(
    "--save-trace",
    metavar="FILE",
    help="Keep what was recorded; as MODEL/routing.trace, memory budgets of MODEL are planned with it.",
)
@click.option("--plot", metavar="FILE", help="PNG of all figures; needs matplotlib.")
@click.option("--html", metavar="FILE", help="One self-contained page with everything; needs matplotlib.")
@loading_options
@json_option
def routing(model: str | None, as_json: bool, **options: Any) -> None:
    """Record which experts MODEL chooses for texts of yours, and show what it does with them by domain.

    A text's domain is its file's name without the ending, or what DOMAIN=PATH says, or a JSONL line's own. Shown are the
    figures of "Mixtral of Experts", section 5, beside the paper's: shares of experts, repeats from token to token and over
    layers, and text coloured by expert; and pairs of experts, and the entropy of the gate.
    """
    if options["trace"] is None:
        if model is None or not options["texts"]:
            raise click.UsageError("give MODEL and --text, or --trace")
    else:
        for name in ("texts", "save_trace", "max_tokens", "window"):
            if options[name]:
                flag = "--text" if name == "texts" else f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{flag} is for recording; --trace names what was recorded")
    from mlx_mixtral.cli.routing.job import RoutingJob

    job = RoutingJob(model, **options)
    found = job.run()
    if as_json:
        emit_json(found)
    else:
        job.report()
