"""Numbers of ``adapter_config.json``, checked: what multiplies every change has to be a number that a training run has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_mixtral.arguments import is_integer, is_number, shown
from mlx_mixtral.errors import CheckpointError

__all__ = ["CONFIG", "MAX_SCALE", "flag", "mapping", "positive", "rank", "text"]

CONFIG = "adapter_config.json"
MAX_SCALE = 1e6
MAX_RANK = 2**16


def positive(where: str, value: object, maximum: float = MAX_SCALE) -> float:
    """A scale: above 0, and no larger than any of its kind.

    Raises:
        CheckpointError: it is none; ``where`` names the file and the key.
    """
    if not is_number(value) or not math.isfinite(value) or not 0 < value <= maximum:
        raise CheckpointError(f"{where} is {shown(value)}; it must be a number above 0 and at most {maximum:g}")
    return float(value)


def rank(where: str, value: object) -> int:
    """A rank. Raises as ``positive``."""
    if not is_integer(value) or not 0 < value <= MAX_RANK:
        raise CheckpointError(f"{where} is {shown(value)}; a rank is an integer from 1 to {MAX_RANK}")
    return value


def flag(where: str, entries: Mapping[str, Any], key: str) -> bool:
    """A switch that is off where it is absent or null. Raises CheckpointError for what is neither true nor false."""
    value = entries.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {shown(value)}, not true or false")
    return bool(value)


def mapping(where: str, entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object that is empty where it is absent or null. Raises CheckpointError for what is no object."""
    value = entries.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {shown(value)}, not an object")
    return value or {}


def text(entries: Mapping[str, Any], *keys: str) -> str | None:
    """The first of several strings that is there."""
    return next((value for key in keys if isinstance(value := entries.get(key), str) and value), None)
