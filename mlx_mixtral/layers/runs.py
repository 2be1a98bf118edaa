"""Changes of some rows of a forward only: those of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice

__all__ = ["by_runs"]

T = TypeVar("T")


def by_runs(
    choice: AdapterChoice, adapted: Mapping[int, T], y: mx.array, change: Callable[[T, slice, mx.array], mx.array]
) -> mx.array:
    """``y``, with ``change(of an adapter, its rows, y of these)`` where rows are an adapter's that changes something here."""
    if choice is None or not adapted:
        return y
    if isinstance(choice, int):
        own = adapted.get(choice)
        return y if own is None else change(own, slice(None), y)
    parts, start, is_changed = [], 0, False
    for adapter, count in choice:
        rows = slice(start, start + count)
        start += count
        found = None if adapter is None else adapted.get(adapter)
        is_changed = is_changed or found is not None
        parts.append(y[rows] if found is None else change(found, rows, y[rows]))
    return mx.concatenate(parts) if is_changed else y
