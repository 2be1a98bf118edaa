"""The cache of a batch whose rows join and leave between steps."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.cache.storage import KVStorage, LayerArrays, grown
from mlx_mixtral.cache.window import Window

__all__ = ["BatchCache"]


class BatchCache:
    """Keys and values of all layers for rows of different lengths: a row's next token goes behind its own last one.

    Rows are told apart by their place, which changes when others leave. Joining and leaving copy the cache, layer by layer,
    so that a step finds one array of just the rows it computes.

    Args:
        storage, window: as of the caches that will join.
    """

    def __init__(self, storage: KVStorage, window: Window | None) -> None:
        self.storage, self.window = storage, window
        self.layers: list[LayerArrays] = []
        self.taken: list[int] = []
        """Tokens taken in, row by row, padding included; as many columns, until a window is full."""
        self._padding: list[int] = []
        self._lengths: mx.array | None = None

    @property
    def rows(self) -> int:
        return len(self.taken)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.taken, default=0)

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for layer in self.layers for array in layer)

    @property
    def lengths(self) -> mx.array:
        """``taken``, ``[B]`` int32."""
        if self._lengths is None:
            self._lengths = mx.array(self.taken, mx.int32)
        return self._lengths

    @property
    def padding(self) -> mx.array | None:
        """Columns at the start of each row that hold nothing, ``[B]`` int32; None when there are none."""
        return mx.array(self._padding, mx.int32) if any(self._padding) else None

    def reserve(self, rows: int, L: int) -> None:
        """Make room for ``L`` tokens more in every row."""
        assert rows == self.rows, (rows, self.rows)
        wanted = self._bounded(self.length + L)
        if wanted > self.capacity:
            whole = -(-max(wanted, self.capacity + self.capacity // 8) // STEP_TOKENS) * STEP_TOKENS
            self._resize(self._bounded(whole))

    def advance(self, L: int, lengths: mx.array | None = None) -> None:
        """Count ``L`` tokens more in every row; ``lengths`` as a step left them."""
        self.taken = [taken + L for taken in self.taken]
        self._lengths = lengths

    def join(self, cache: KVCache) -> None:
        """Add the rows of ``cache`` behind those there are. Its arrays are taken: it is empty afterwards."""
        capacity = max(self.capacity, cache.capacity)
        self._resize(capacity)
        joining, rows, cache.layers = cache.layers, cache.rows, []
        for layer, held in enumerate(joining):
            fitted = self._with_columns(held, capacity)
            if not self.taken:
                self.layers.append(fitted)
                continue
            self.layers[layer] = tuple(
                mx.concatenate([old, new]) for old, new in zip(self.layers[layer], fitted, strict=True)
            )
            mx.eval(self.layers[layer])
        self.taken += [cache.length] * rows
        self._padding += cache.left_padding or [0] * rows
        self._lengths = None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; the order stays, the places close up."""
        if list(rows) == list(range(self.rows)):
            return
        self.taken, self._padding = [self.taken[row] for row in rows], [self._padding[row] for row in rows]
        self._lengths = None
        if not rows:
            self.layers = []
            return
        # A long row that left takes its columns along.
        capacity = min(self.capacity, -(-(self.length + 1) // STEP_TOKENS) * STEP_TOKENS)
        places = mx.array(list(rows))
        for layer, held in enumerate(self.layers):
            self.layers[layer] = tuple(array[places, :, :capacity] for array in held)
            mx.eval(self.layers[layer])

    def _bounded(self, columns: int) -> int:
        return columns if self.window is None else min(columns, self.window.columns)

    def _resize(self, capacity: int) -> None:
        for layer, held in enumerate(self.layers):
            self.layers[layer] = self._with_columns(held, capacity)

    def _with_columns(self, held: LayerArrays, capacity: int) -> LayerArrays:
        rows, there = held[0].shape[0], held[0].shape[2]
        if capacity > there:
            return grown(held, self.storage.empty(rows, capacity - there))
        return held
