"""Options of ``convert``, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.cli.fields import argument, flag, flag_name, is_given, option
from mlx_mixtral.cli.options import device_option, json_flag, revision_option
from mlx_mixtral.cli.values import ModelName, Place
from mlx_mixtral.config.quantization import AFFINE_BITS, MODES

if TYPE_CHECKING:
    from mlx_mixtral_convert import Recipe

__all__ = ["RECIPES", "ConvertOptions", "check_options"]

DTYPES = ("auto", "float16", "bfloat16", "float32")
ROUNDINGS = ("plain", "search", "gptq", "tuned")
FORMATS = ("mlx", "hf", "gguf")
# Repeated from the converter, which is not imported for help.
RECIPES = ("experts-2bit", "experts-3bit", "experts-3bit-down-4bit", "experts-4bit", "experts-5bit")
GGUF_TYPES = (
    "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    "Q3_K", "Q4_K", "Q5_K",
)  # fmt: skip
# What has a meaning with --to, beside the type: of GGUF's weights, or of Hugging Face's.
EXPORT_OPTIONS = {
    "source",
    "dest",
    "to",
    "kind",
    "overwrite",
    "dry_run",
    "revision",
    "device",
    "as_json",
    "upload",
    "public",
}
TYPE_OPTIONS = {"hf": {"dtype"}, "gguf": {"gguf_type", "calibration"}}

Overrides = Mapping[str, dict[str, int] | None]


def parse_overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Overrides:
    """Option callback for ``*.self_attn.*=6``, ``lm_head=8:32``, ``*.gate=none``, repeatable."""
    overrides: dict[str, dict[str, int] | None] = {}
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


@dataclass(frozen=True)
class ConvertOptions:
    source: str = argument(type=ModelName(files=True))
    dest: str = argument(type=Place("dir", expands=False))
    bits: str | None = option(
        "--bits",
        "Bits per weight; none converts without quantising.  [default: 4, or what --mode implies]",
        type=click.Choice([*map(str, AFFINE_BITS), "none"]),
    )
    group_size: int | None = option(
        "--group-size N", "Number of weights that share a scale.  [default: 64, or what --mode implies]"
    )
    # No choice of click's: the library names an unknown mode, as for one in a recipe.
    mode: str = option("--mode", "How weights are packed.", metavar="|".join(MODES), default="affine")
    to: str = option(
        "--to",
        "Format of DEST: hf is a Hugging Face folder for transformers, gguf a file for llama.cpp.",
        type=click.Choice(FORMATS),
        default="mlx",
    )
    gguf_type: str | None = option(
        "--type", "Type of GGUF's weights, or a mix of types.  [default: F16]", type=click.Choice(GGUF_TYPES)
    )
    dtype: str = option(
        "--dtype", "Type of scales and norms; with --to hf, of all weights.", type=click.Choice(DTYPES), default="auto"
    )
    recipe: str | None = option("--recipe NAME|FILE", f"A JSON file, or one of {', '.join(RECIPES)}.")
    rounding: str | None = option(
        "--rounding",
        "How weights are rounded; the format stays the same.  [default: plain]",
        type=click.Choice(ROUNDINGS),
    )
    calibration: str | None = option(
        "--calibration FILE",
        "Measurements of SOURCE by `mlx-mixtral calibrate`, for --rounding and --fit.",
    )
    fit: str | None = option(
        "--fit SIZE|mac", "Choose the bits of each matrix so that the weights fit a size, or this Mac."
    )
    context: int | None = option(
        "--context N", "Context length, in tokens, that --fit mac leaves room for.  [default: 4096]"
    )
    override: Overrides = option(
        "--override PATTERN=BITS[:GROUP]|none",
        "Bits of the modules whose names match; repeatable, and the last match counts.",
        callback=parse_overrides,
        multiple=True,
    )
    adapters: tuple[AdapterSource, ...] = option(
        "--adapter PATH[=SCALE]",
        "A LoRA adapter to fuse into the weights: a folder or a hub repository, and by how much to multiply it; repeatable.",
        multiple=True,
    )
    exact: bool = flag(
        "--exact", "Keep the integers of a quantised source unchanged wherever MLX has a format for them."
    )
    kind: str = option("--kind KIND", "Layout of SOURCE, such as gguf, hf or native.", default="auto")
    overwrite: bool = flag("--overwrite", "Replace DEST if it is a conversion made by this program.")
    restart: bool = flag("--restart", "Start over and ignore what an interrupted conversion to DEST left.")
    stream: bool = flag("--stream", "Fetch a hub repository's weights as they are needed, without storing them.")
    dry_run: bool = flag("--dry-run", "Check everything and print the plan; write nothing.")
    upload: str | None = option(
        "--upload OWNER/NAME", "Then upload DEST to the hub, with a model card; `upload` has more options."
    )
    public: bool = flag("--public", "Make the --upload repository public.  [default: private]")
    revision: str | None = revision_option()
    device: str | None = device_option()
    as_json: bool = json_flag()

    def make_recipe(self) -> Recipe:
        """How to pack."""
        from mlx_mixtral_convert import Recipe, named_recipe

        if self.recipe is not None:
            recipe = named_recipe(self.recipe)
            recipe = replace(recipe, overrides={**recipe.overrides, **self.override})
        elif self.bits is None:
            recipe = Recipe(group_size=self.group_size, mode=self.mode, overrides=dict(self.override))
        else:
            bits = None if self.bits == "none" else int(self.bits)
            recipe = Recipe(bits, self.group_size, self.mode, dict(self.override))
        return recipe if self.rounding is None else replace(recipe, rounding=self.rounding)


def check_options(ctx: click.Context, given: ConvertOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: naming the first.
    """
    typed = [name for name in ctx.params if is_given(ctx, name)]
    if given.public and given.upload is None:
        raise click.UsageError("--public applies only with --upload; add --upload owner/name")
    if given.upload is not None and given.dry_run:
        raise click.UsageError("--dry-run writes nothing that --upload could send; leave out one of them")
    if given.to != "mlx":
        known = EXPORT_OPTIONS | TYPE_OPTIONS[given.to]
        for name in typed:
            if name not in known:
                instead = {
                    "dtype": "; give --type",
                    "gguf_type": "; give --dtype",
                    "adapters": "; fuse it with --bits none first, and convert the result",
                }.get(name, "")
                raise click.UsageError(f"{flag_name(ctx, name)} does not apply with --to {given.to}{instead}")
        return
    if given.gguf_type is not None:
        raise click.UsageError("--type applies only with --to gguf; use --bits for MLX weights")
    packing = ("bits", "group_size", "mode")
    refusals = (
        (given.recipe, packing, "--recipe already sets what {flag} sets; give only one of them"),
        (given.exact, packing, "--exact keeps the source's own packing; leave out either {flag} or --exact"),
        (
            given.fit,
            (*packing, "recipe", "override"),
            "--fit chooses the bits, but {flag} sets them; give only one of the two",
        ),
    )
    for choice, others, message in refusals:
        if choice not in (None, False) and (other := next((name for name in others if name in typed), None)):
            raise click.UsageError(message.format(flag=flag_name(ctx, other)))
    if given.fit is None and given.context is not None:
        raise click.UsageError("--context applies only with --fit mac")
    if given.bits == "none":
        # Matrices that an override packs take group size and rounding.
        unused = {"--mode": given.mode != "affine"}
        if not any(given.override.values()):
            unused |= {
                "--group-size": given.group_size is not None,
                "--rounding": given.rounding not in (None, "plain"),
            }
        if name := next((name for name, is_unused in unused.items() if is_unused), ""):
            raise click.UsageError(f"--bits none packs nothing, but {name} says how to pack; give only one of the two")
