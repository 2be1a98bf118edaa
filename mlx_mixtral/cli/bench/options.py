"""Options of ``bench``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from mlx_mixtral.cli.fields import argument, group, option
from mlx_mixtral.cli.options import LoadOptions, json_flag, number_list, overwrite_flag
from mlx_mixtral.cli.values import ModelName

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
    model: str = argument(type=ModelName())
    prompts: tuple[int, ...] | None = option(
        "--prompt LIST",
        "Prompt lengths for prefill and time to first token.  [default: 128,512,2048]",
        callback=_sizes,
    )
    depths: tuple[int, ...] | None = option(
        "--depth LIST", "Context lengths at which decoding is measured.  [default: 128,2048]", callback=_sizes
    )
    batches: tuple[int, ...] | None = option(
        "--batch LIST", "Batch sizes to decode.  [default: 1,4,8]", callback=_sizes
    )
    tokens: int = option("--tokens", "Tokens decoded in each measurement.", default=32)
    repeats: int = option("--repeats", "Measurements of each kind, after one to warm up.", default=5)
    compare: str | None = option(
        "--compare", "Also run this on the same folder, alternating between the two.", type=click.Choice(("mlx-lm",))
    )
    plot: str | None = option("--plot FILE", "Write a PNG of the results; needs matplotlib.")
    overwrite: bool = overwrite_flag("the plot")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
