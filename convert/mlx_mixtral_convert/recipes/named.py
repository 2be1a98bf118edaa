"""Recipes with a name: the trunk, 3% of Mixtral's weights, in more bits than the experts (arXiv 2312.17238 measures why)."""

from __future__ import annotations

from mlx_mixtral.arguments import as_path, check_type
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert.recipes.recipe import Override, Recipe

__all__ = ["NAMED", "named_recipe"]

_TRUNK = ("*.self_attn.*", "model.embed_tokens", "lm_head")


def _mixed(experts: int, trunk: int, group_size: int = 64, down: int | None = None) -> Recipe:
    overrides: dict[str, Override] = {pattern: {"bits": trunk, "group_size": 64} for pattern in _TRUNK}
    if down is not None:
        overrides["*.down_proj"] = {"bits": down, "group_size": group_size}
    return Recipe(experts, group_size, overrides=overrides)


NAMED = {
    "experts-2bit": _mixed(2, 4, 64),
    "experts-3bit": _mixed(3, 6),
    "experts-3bit-down-4bit": _mixed(3, 6, down=4),
    "experts-4bit": _mixed(4, 8),
    "experts-5bit": _mixed(5, 8),
}
"""Experts at the bits in the name, attention, embedding and head higher; the router is never packed."""


def named_recipe(name_or_file: str) -> Recipe:
    """One of ``NAMED``, or a recipe file.

    Raises:
        InvalidRequestError: neither a name nor a file.
        ConfigError: the file is not a recipe.
    """
    check_type("name_or_file", name_or_file, str, "the name of a recipe or of a file")
    if name_or_file in NAMED:
        return NAMED[name_or_file]
    file = as_path("recipe", name_or_file)
    if not file.is_file() and file.suffix != ".json":
        raise InvalidRequestError(
            f"{name_or_file!r} is neither a recipe file nor a named recipe; the named recipes are {', '.join(NAMED)}"
        )
    return Recipe.from_file(file)
