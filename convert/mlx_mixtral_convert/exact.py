"""``exact``: the output's packing is the source's, wherever MLX has one that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert.output.plan import Plan
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.pipeline import Written
from mlx_mixtral_convert.recipes import Recipe
from mlx_mixtral_convert.recipes.recipe import ROUTER_MIN_BITS
from mlx_mixtral_convert.report import PackedAs
from mlx_mixtral_convert.sources import PackedSource, TensorSource
from mlx_mixtral_convert.sources.adapted import AdaptedSource

__all__ = ["check_kept", "exact_recipe", "exact_specs", "packed_as"]


def exact_recipe(recipe: Recipe) -> Recipe:
    """The recipe with its overrides alone: everything else has the source's own packing."""
    return replace(recipe, bits=None, group_size=None, mode="affine")


def exact_specs(
    source: TensorSource, recipe: Recipe
) -> tuple[dict[str, QuantizationSpec | None], dict[str, NativePacking]]:
    """The packing of every matrix, and what its source's packing is for those that have one.

    ``recipe`` is one of ``exact_recipe``; its overrides win.

    Raises:
        ConfigError: an override that does not fit the model.
        ConversionError: experts of one matrix are packed in different ways.
        InvalidRequestError: a source of floats, which has no packing to keep.
    """
    if not isinstance(source, PackedSource):
        raise InvalidRequestError(
            "exact keeps the packing of quantised weights, but this source has none; leave out --exact"
        )
    specs, native = recipe.assign(source.config), {}
    for matrix in matrices(source.config):
        if (packing := source.native(matrix)) is None:
            continue
        native[matrix.path] = packing
        if not packing.spec.has_group_for(matrix.in_features):
            continue
        # A router that has to be rounded again keeps its values instead.
        router = matrix.part == "router" and (packing.spec.bits < ROUTER_MIN_BITS or not packing.exact)
        if not router and not any(fnmatchcase(matrix.path, pattern) for pattern in recipe.overrides):
            packing.spec.check_divides(matrix.in_features, matrix.path)
            specs[matrix.path] = packing.spec
    return specs, native


def check_kept(source: AdaptedSource) -> None:
    """Raise InvalidRequestError where adapters leave no matrix of a packed source as it was, so that nothing can be kept."""
    if not isinstance(source.base, PackedSource):
        return
    base, changed = source.base, [m for m in matrices(source.config) if m.path in source.touched]
    kept = [m for m in matrices(source.config) if (packing := base.native(m)) is not None and packing.exact]
    if kept and set(kept) <= set(changed):
        raise InvalidRequestError(
            f"exact keeps packed matrices as they are, but the adapters change all {len(kept)} of them; give bits instead"
        )


def packed_as(plan: Plan, written: Written | None) -> Iterator[PackedAs]:
    """For each type of an exact conversion's source: what became of it, how many matrices, and the largest error of them."""
    errors = {error.path: error for error in written.errors} if written else {}
    kinds: dict[tuple[str, str, str], list[Matrix]] = {}
    for matrix in matrices(plan.config):
        if (how := plan.exactness(matrix.path)) is not None:
            key = (plan.native[matrix.path].type_name, str(plan.specs[matrix.path]), how)
            kinds.setdefault(key, []).append(matrix)
    for (type_name, spec, how), members in kinds.items():
        largest = [errors[matrix.path].relative_rms for matrix in members if matrix.path in errors]
        yield PackedAs(type_name, spec, how, len(members), max(largest) if largest else None)
