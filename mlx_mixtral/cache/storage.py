"""How one layer's keys and values lie in memory. Functions of arrays, so that a compiled step can carry them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

__all__ = ["KVStorage", "Kernel", "LayerArrays", "PlainStorage", "grown", "joined", "written"]

Kernel = Callable[[mx.array, mx.array, mx.array, float, mx.array | str | None], mx.array]
"""Attention of queries to keys and values, with a scale and a mask: what computes it."""
LayerArrays = tuple[mx.array, ...]
"""What a storage keeps of one layer: arrays ``[B, KV, capacity, …]``."""


class KVStorage(ABC):
    """Keys and values of one layer, ``[B, KV, L, d]`` on the way in. Hashable: equal storages share a compiled step."""

    @abstractmethod
    def empty(self, rows: int, capacity: int) -> LayerArrays:
        """Room for ``capacity`` tokens of each row."""

    @abstractmethod
    def pack(self, keys: mx.array, values: mx.array) -> LayerArrays:
        """New tokens as they are held."""

    @abstractmethod
    def attend(
        self,
        held: LayerArrays,
        first: int,
        end: int,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        attention: Kernel,
    ) -> mx.array:
        """Attention of ``queries [B, H, L, d]`` over columns ``first`` to ``end``, giving the same shape."""

    def put(self, held: LayerArrays, start: int, keys: mx.array, values: mx.array) -> LayerArrays:
        """With new tokens in columns ``start`` and after, the same for all rows."""
        return written(held, start, self.pack(keys, values))

    def scatter(self, held: LayerArrays, columns: mx.array, keys: mx.array, values: mx.array) -> LayerArrays:
        """With new tokens in ``columns [B, L]``."""
        return tuple(scattered(old, columns, new) for old, new in zip(held, self.pack(keys, values), strict=True))


@dataclass(frozen=True)
class PlainStorage(KVStorage):
    """Numbers of type ``dtype``: ``(keys, values)``, each ``[B, KV, capacity, d]``."""

    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    def empty(self, rows: int, capacity: int) -> LayerArrays:
        shape = (rows, self.kv_heads, capacity, self.head_dim)
        return (mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype))

    def pack(self, keys: mx.array, values: mx.array) -> LayerArrays:
        return (keys.astype(self.dtype), values.astype(self.dtype))

    def attend(
        self,
        held: LayerArrays,
        first: int,
        end: int,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        attention: Kernel,
    ) -> mx.array:
        keys, values = (array[:, :, first:end].astype(queries.dtype) for array in held)
        return attention(queries, keys, values, scale, mask)


def written(held: LayerArrays, start: int, new: LayerArrays) -> LayerArrays:
    """``held`` with the tokens ``new`` in columns ``start`` and after."""
    # MLX writes into the arrays themselves when nothing else holds them by the time it computes.
    end = start + new[0].shape[2]
    for old, array in zip(held, new, strict=True):
        old[:, :, start:end] = array
    return held


def scattered(held: mx.array, columns: mx.array, new: mx.array) -> mx.array:
    """``held [B, KV, capacity, d]`` with ``new [B, KV, L, d]`` in ``columns [B, L]``: one kernel, written in place."""
    return mx.put_along_axis(held, mx.broadcast_to(columns[:, None, :, None], new.shape), new, axis=2)


def grown(held: LayerArrays, room: LayerArrays) -> LayerArrays:
    """``held`` with ``room`` behind it."""
    return tuple(mx.concatenate([old, more], axis=2) for old, more in zip(held, room, strict=True))


def joined(held: LayerArrays, columns: int, new: LayerArrays) -> LayerArrays:
    """The first ``columns`` of ``held`` and ``new`` behind them, as arrays of their own."""
    return grown(tuple(array[:, :, :columns] for array in held), new) if columns else new
