"""How one layer's keys and values lie in memory. Functions of arrays, so that a compiled step can carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

__all__ = ["LayerArrays", "PlainStorage", "Storage", "grown"]

LayerArrays = tuple[mx.array, ...]
"""What a storage keeps of one layer: arrays ``[B, KV, capacity, …]``."""


class Storage(Protocol):
    """Keys and values of one layer, ``[B, KV, L, d]`` on the way in. Hashable: equal storages share a compiled step."""

    def empty(self, rows: int, capacity: int) -> LayerArrays:
        """Room for ``capacity`` tokens of each row."""
        ...

    def put(self, held: LayerArrays, start: int, keys: mx.array, values: mx.array) -> LayerArrays:
        """With new tokens in columns ``start`` and after, the same for all rows."""
        ...

    def scatter(self, held: LayerArrays, columns: mx.array, keys: mx.array, values: mx.array) -> LayerArrays:
        """With new tokens in ``columns [B, L]``."""
        ...

    def attend(
        self, held: LayerArrays, first: int, end: int, queries: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        """Attention of ``queries [B, H, L, d]`` over columns ``first`` to ``end``, giving the same shape."""
        ...


@dataclass(frozen=True)
class PlainStorage:
    """Numbers of type ``dtype``: ``(keys, values)``, each ``[B, KV, capacity, d]``."""

    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    def empty(self, rows: int, capacity: int) -> LayerArrays:
        shape = (rows, self.kv_heads, capacity, self.head_dim)
        return (mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype))

    def put(self, held: LayerArrays, start: int, keys: mx.array, values: mx.array) -> LayerArrays:
        # MLX writes into the arrays themselves when nothing else holds them by the time it computes.
        end = start + keys.shape[2]
        old_keys, old_values = held
        old_keys[:, :, start:end] = keys
        old_values[:, :, start:end] = values
        return (old_keys, old_values)

    def scatter(self, held: LayerArrays, columns: mx.array, keys: mx.array, values: mx.array) -> LayerArrays:
        old_keys, old_values = held
        return (scattered(old_keys, columns, keys), scattered(old_values, columns, values))

    def attend(
        self, held: LayerArrays, first: int, end: int, queries: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        keys, values = (array[:, :, first:end] for array in held)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def scattered(held: mx.array, columns: mx.array, new: mx.array) -> mx.array:
    """``held [B, KV, capacity, d]`` with ``new [B, KV, L, d]`` in ``columns [B, L]``: one kernel, written in place."""
    return mx.put_along_axis(held, mx.broadcast_to(columns[:, None, :, None], new.shape), new, axis=2)


def grown(held: LayerArrays, room: LayerArrays) -> LayerArrays:
    """``held`` with ``room`` behind it."""
    return tuple(mx.concatenate([old, more], axis=2) for old, more in zip(held, room, strict=True))
