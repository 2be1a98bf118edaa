"""The tokens of one forward and their place in the cache: what attention needs to know of it, and nothing else.

Two kinds. A ``Chunk`` knows where it is as numbers, so that keys are sliced and most masks are none; it is how prompts enter. A
``Step`` knows it as arrays: the same graph serves every step, and is compiled once for a size of the cache.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.storage import LayerArrays, Storage

__all__ = ["Chunk", "Span", "Step", "causal_mask"]


class Span(Protocol):
    """Tokens that are being computed, ``L`` of each row."""

    @property
    def positions(self) -> int | mx.array:
        """Rotary position of the first token: one number, or one a row ``[B]``."""
        ...

    @property
    def frequencies(self) -> mx.array | None:
        """Table of rotary frequencies, None where the base says it all."""
        ...

    def enter(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put rotated keys and values ``[B, KV, L, d]`` into the cache; once a layer, before ``attend``."""
        ...

    def attend(self, layer: int, queries: mx.array, scale: float, *, last_only: bool = False) -> mx.array:
        """Attention of rotated ``queries [B, H, L, d]`` over all they may see; ``last_only`` gives the last token's."""
        ...


class Chunk:
    """Tokens from column ``start`` on, in all rows.

    Args:
        first: columns before this one are out of every token's sight.
        mask: over the columns from ``first`` on.
    """

    def __init__(
        self,
        storage: Storage,
        layers: list[LayerArrays],
        start: int,
        length: int,
        positions: int | mx.array,
        first: int,
        mask: mx.array | str | None,
        frequencies: mx.array | None,
    ) -> None:
        self.positions, self.frequencies = positions, frequencies
        self._storage, self._layers = storage, layers
        self._start, self._end = start, start + length
        self._first, self._mask = first, mask

    def enter(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._layers[layer] = self._storage.put(self._layers[layer], self._start, keys, values)

    def attend(self, layer: int, queries: mx.array, scale: float, *, last_only: bool = False) -> mx.array:
        mask = self._mask
        if last_only:
            queries = queries[:, :, -1:]
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        return self._storage.attend(self._layers[layer], self._first, self._end, queries, scale, mask)


class Step:
    """``length`` tokens a row from column ``lengths[row]`` on; ``layers`` is replaced, layer by layer.

    Args:
        lengths: ``[B]`` int32, columns that are taken.
        padding: ``[B]`` int32, columns at the start of a row that hold nothing; None when there are none.
    """

    def __init__(
        self,
        storage: Storage,
        layers: list[LayerArrays],
        lengths: mx.array,
        padding: mx.array | None,
        length: int,
        window: int | None,
        frequencies: mx.array | None,
    ) -> None:
        self.positions: mx.array = lengths if padding is None else lengths - padding
        self.frequencies = frequencies
        self._storage, self.layers = storage, layers
        self._columns = lengths[:, None] + mx.arange(length)
        self._capacity = layers[0][0].shape[2]
        self._mask = causal_mask(mx.arange(self._capacity), self._columns, padding, window)

    def enter(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self.layers[layer] = self._storage.scatter(self.layers[layer], self._columns, keys, values)

    def attend(self, layer: int, queries: mx.array, scale: float, *, last_only: bool = False) -> mx.array:
        mask = self._mask
        if last_only:
            queries, mask = queries[:, :, -1:], mask[:, :, -1:]
        return self._storage.attend(self.layers[layer], 0, self._capacity, queries, scale, mask)


def causal_mask(keys: mx.array, queries: mx.array, padding: mx.array | None, window: int | None) -> mx.array:
    """Which of the columns ``keys [T]`` those at ``queries [B, L]`` may see, ``[B, 1, L, T]`` boolean."""
    queries = queries[:, None, :, None]
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    if padding is None:
        return allowed
    # A padding token attends to itself: a row of a softmax without any key would be NaN, and spread.
    return (allowed & (keys >= padding[:, None, None, None])) | (keys == queries)
