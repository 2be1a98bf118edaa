"""``mlx-mixtral convert``: a checkpoint to MLX, quantised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mlx_mixtral.cli.console import emit_json, note, one_line
from mlx_mixtral.cli.convert.export import EXPORTS, GGUF_TYPES, export
from mlx_mixtral.cli.options import json_option
from mlx_mixtral.config.quantization import AFFINE_BITS, MODES

if TYPE_CHECKING:
    from mlx_mixtral_convert import Recipe

__all__ = ["convert"]

DTYPES = ("auto", "float16", "bfloat16", "float32")
ROUNDINGS = ("plain", "search", "gptq")


Overrides = dict[str, dict[str, int] | None]


def parse_overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Overrides:
    """Option callback for ``*.self_attn.*=6``, ``lm_head=8:32``, ``*.gate=none``, repeatable."""
    overrides: Overrides = {}
    for value in values:
        pattern, _, packing = value.rpartition("=")
        bits, colon, group = packing.partition(":")
        try:
            parsed = None if packing == "none" else {"bits": int(bits)} | ({"group_size": int(group)} if colon else {})
        except ValueError:
            pattern = ""
        if not pattern:
            wanted = "PATTERN=BITS[:GROUP] or PATTERN=none; write '*.self_attn.*=6'"
            raise click.BadParameter(f"{value!r} is not {wanted}", ctx, param)
        # The last of several that match wins: a repeated pattern moves to the end.
        overrides.pop(pattern, None)
        overrides[pattern] = parsed
    return overrides


@click.command(short_help="Convert a checkpoint to MLX, quantised.")
@click.argument("source")
@click.argument("dest")
@click.option(
    "--bits",
    type=click.Choice([*map(str, AFFINE_BITS), "none"]),
    help="Bits a weight; none converts without quantising.  [default: 4, or what --mode means]",
)
@click.option("--group-size", type=int, metavar="N", help="Weights that share a scale.  [default: 64, or the mode's]")
@click.option(
    "--mode", metavar="|".join(MODES), default="affine", show_default=True, help="How weights are packed."
)  # the library names an unknown mode, as for one in a recipe
@click.option(
    "--to", type=click.Choice(("mlx", *EXPORTS)), default="mlx", show_default=True, help="What DEST is: hf is a Hugging "
    "Face folder for transformers, gguf a file for llama.cpp.",
)  # fmt: skip
@click.option("--type", "gguf_type", type=click.Choice(GGUF_TYPES), help="Type of GGUF's weights.  [default: F16]")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
    help="Type of scales and norms; with --to hf, of all weights.",
)  # fmt: skip
@click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="A named recipe, or one as JSON.")
@click.option(
    "--rounding", type=click.Choice(ROUNDINGS), help="How codes are chosen at the same format.  [default: plain]"
)
@click.option(
    "--calibration", type=click.Path(), metavar="FILE", help="What `mlx-mixtral calibrate` measured on SOURCE."
)
@click.option("--fit", metavar="SIZE|mac", help="Choose bits so that the weights fit a size, or this Mac.")
@click.option(
    "--context", type=int, metavar="N", help="Tokens of KV cache that --fit mac leaves room for.  [default: 4096]"
)
@click.option(
    "--override",
    callback=parse_overrides,
    multiple=True,
    metavar="PATTERN=BITS[:GROUP]|none",
    help="Other bits for some modules; repeatable, the last that matches wins.",
)
@click.option(
    "--exact", is_flag=True, help="Keep the packing of a quantised source: integers move as they are wherever they fit."
)
@click.option(
    "--kind", metavar="KIND", default="auto", show_default=True, help="Layout of SOURCE: gguf, hf, native, ..."
)
@click.option("--overwrite", is_flag=True, help="Replace DEST if it is a finished conversion of ours.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted conversion to DEST left.")
@click.option("--stream", is_flag=True, help="Fetch a hub repository's weights as they are needed; store none of them.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be written; write nothing.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub repository.")
@json_option
@click.pass_context
def convert(
    ctx: click.Context,
    source: str,
    dest: str,
    bits: str | None,
    group_size: int | None,
    mode: str,
    to: str,
    gguf_type: str | None,
    dtype: str,
    recipe_name: str | None,
    rounding: str | None,
    calibration: str | None,
    fit: str | None,
    context: int | None,
    override: Overrides,
    exact: bool,
    kind: str,
    overwrite: bool,
    restart: bool,
    stream: bool,
    dry_run: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Convert SOURCE, a folder, a GGUF file or a hub repository, to MLX weights in the new folder DEST.

    DEST appears complete or not at all. Memory stays small whatever the size of the model. After an interruption the same
    command goes on where it was.

    With --to the way is back: SOURCE, an MLX folder for instance, becomes what other programs read. Options about MLX's
    packing do not apply then.
    """
    if to != "mlx":
        export(ctx)
        return
    if gguf_type is not None:
        raise click.UsageError("--type applies with --to gguf only; --bits says how MLX weights are packed")
    if recipe_name is not None:
        for name in ("bits", "group_size", "mode"):
            if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
                raise click.UsageError(f"--recipe already says --{name.replace('_', '-')}; give one of them")

    if exact:
        for name in ("bits", "group_size", "mode"):
            if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
                flag = f"--{name.replace('_', '-')}"
                raise click.UsageError(f"--exact keeps the source's own packing; leave {flag} out, or --exact")

    from mlx_mixtral.cli.convert.tables import conversion_progress, print_conversion
    from mlx_mixtral_convert import convert as run

    if fit is not None:
        for name in ("bits", "group_size", "mode", "recipe_name", "override"):
            if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
                option = name.removesuffix("_name").replace("_", "-")
                raise click.UsageError(f"--fit chooses the bits, --{option} says them; give one of the two")
    elif context is not None:
        raise click.UsageError("--context is for --fit mac")
    if bits == "none":
        _refuse_idle(group_size, mode, rounding, override)
    recipe = _recipe(bits, group_size, mode, recipe_name, override)
    if rounding is not None:
        recipe = replace(recipe, rounding=rounding)
    with conversion_progress() as progress:
        report = run(
            source,
            dest,
            recipe=recipe,
            dtype=dtype,
            revision=revision,
            exact=exact,
            kind=kind,
            overwrite=overwrite,
            restart=restart,
            stream=stream,
            dry_run=dry_run,
            calibration=calibration,
            fit=fit,
            context=context,
            progress=progress,
        )
    if as_json:
        emit_json(report.to_dict())
    else:
        print_conversion(source, Path(dest), report.to_dict())
    for text in report.notes:
        note(f"note: {one_line(text)}")


def _refuse_idle(group_size: int | None, mode: str, rounding: str | None, overrides: Overrides) -> None:
    """Options that ``--bits none`` leaves without effect; matrices that an override packs take group size and rounding."""
    idle = {"--mode": mode != "affine"}
    if not any(overrides.values()):
        idle |= {"--group-size": group_size is not None, "--rounding": rounding not in (None, "plain")}
    if flag := next((flag for flag, given in idle.items() if given), None):
        raise click.UsageError(f"--bits none packs nothing, {flag} says how; give one of the two")


def _recipe(bits: str | None, group_size: int | None, mode: str, file: str | None, overrides: Overrides) -> Recipe:
    from mlx_mixtral_convert import Recipe, named_recipe

    if file is not None:
        recipe = named_recipe(file)
        return replace(recipe, overrides={**recipe.overrides, **overrides})
    if bits is None:
        return Recipe(group_size=group_size, mode=mode, overrides=overrides)
    return Recipe(None if bits == "none" else int(bits), group_size, mode, overrides)
