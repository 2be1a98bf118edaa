"""``mlx-mixtral bench``: how fast a model is here, against what memory allows, published figures and mlx-lm."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.options import json_option, loading_options, number_list

__all__ = ["bench"]


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Option callback for ``128,512``; ``none`` is an empty list."""
    if value is None or value.strip() == "none":
        return None if value is None else ()
    sizes = number_list(int, "numbers", "128,512, or none")(ctx, param, value)
    if not sizes:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write 128,512, or none", ctx, param)
    return sizes


@click.command(short_help="Measure speed here, and beside mlx-lm.")
@click.argument("model")
@click.option(
    "--prompt",
    "prompts",
    callback=_sizes,
    metavar="LIST",
    help="Lengths of prompts for prefill and time to first token.  [default: 128,512,2048]",
)
@click.option(
    "--depth",
    "depths",
    callback=_sizes,
    metavar="LIST",
    help="Tokens of context to decode after.  [default: 128,2048]",
)
@click.option("--batch", "batches", callback=_sizes, metavar="LIST", help="Rows decoded at once.  [default: 1,4,8]")
@click.option("--tokens", type=int, default=32, show_default=True, help="Tokens each measurement decodes.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Measurements of each, after one to warm up.")
@click.option("--compare", type=click.Choice(("mlx-lm",)), help="Run it on the same folder too, the sides in turn.")
@click.option("--plot", metavar="FILE", help="PNG of all of it; needs matplotlib.")
@loading_options
@json_option
def bench(model: str, as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL, a folder or a hub repository, is on this machine.

    Prompts are random tokens and generation is greedy. Shown are medians and, behind them, the least and the most. The share
    of memory bandwidth is what decoding reads (attention, the experts of a token, keys and values) over what copying in
    memory reaches in the same run. `none` leaves a list out. Default lists are cut to the model's context.

    On MLX's CPU backend --compare runs mlx-lm twice: as it comes, and in float32, in which we compute there.
    """
    from mlx_mixtral.cli.bench.job import BenchJob

    job = BenchJob(model, **options)
    try:
        job.run()
    except KeyboardInterrupt:
        if not job.report.of("prefill") and not job.report.of("decode") and not job.report.of("batch"):
            raise
        _show(job, as_json)
        raise
    _show(job, as_json)
    job.plot()


def _show(job: Any, as_json: bool) -> None:
    if as_json:
        emit_json(job.to_dict())
    else:
        job.print()
