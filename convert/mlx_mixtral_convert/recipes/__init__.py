"""Recipes: which matrix gets which bits."""

from mlx_mixtral_convert.recipes.named import NAMED, named_recipe
from mlx_mixtral_convert.recipes.recipe import Recipe

__all__ = ["NAMED", "Recipe", "named_recipe"]
