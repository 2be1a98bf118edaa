"""Options of ``bench``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from mlx_mixtral.cli.options import LoadOptions, argument, group, json_flag, number_list, option

__all__ = ["BenchOptions"]


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Option callback for ``128,512``; ``none`` is an empty list."""
    if value is None or value.strip() == "none":
        return None if value is None else ()
    sizes = number_list(int, "numbers", "128,512, or none")(ctx, param, value)
    if not sizes:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write 128,512, or none", ctx, param)
    return sizes


@dataclass(frozen=True)
class BenchOptions:
    model: str = argument()
    prompts: tuple[int, ...] | None = option(
        "--prompt", callback=_sizes, metavar="LIST",
        help="Lengths of prompts for prefill and time to first token.  [default: 128,512,2048]",
    )  # fmt: skip
    depths: tuple[int, ...] | None = option(
        "--depth", callback=_sizes, metavar="LIST", help="Tokens of context to decode after.  [default: 128,2048]"
    )
    batches: tuple[int, ...] | None = option(
        "--batch", callback=_sizes, metavar="LIST", help="Rows decoded at once.  [default: 1,4,8]"
    )
    tokens: int = option("--tokens", default=32, show_default=True, help="Tokens each measurement decodes.")
    repeats: int = option("--repeats", default=5, show_default=True, help="Measurements of each, after one to warm up.")
    compare: str | None = option(
        "--compare", type=click.Choice(("mlx-lm",)), help="Run it on the same folder too, the sides in turn."
    )
    plot: str | None = option("--plot", metavar="FILE", help="PNG of all of it; needs matplotlib.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
