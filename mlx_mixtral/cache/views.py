"""The tokens of one forward and their place in the cache: what attention needs to know of it, and nothing else.

A ``PrefillView`` knows where it is as numbers, so that keys are sliced and most masks are none; it is how prompts enter. A
``RingPrefillView`` is one that enters a cache of bounded size and overfills it. A ``DecodeView`` knows where it is as arrays:
the same graph serves every step, and is compiled once for a size of the cache.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.storage import Kernel, KVStorage, LayerArrays, joined, written
from mlx_mixtral.cache.window import Window, causal_mask

__all__ = ["CacheView", "DecodeView", "PrefillView", "RingPrefillView"]


class CacheView(Protocol):
    """Tokens that are being computed, ``L`` of each row."""

    @property
    def positions(self) -> int | mx.array:
        """Rotary position of the first token: one number, or one a row ``[B]``."""
        ...

    @property
    def frequencies(self) -> mx.array | None:
        """Table of rotary frequencies, None where the base says it all."""
        ...

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put rotated keys and values ``[B, KV, L, d]`` into the cache; once a layer, before ``attend``."""
        ...

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        """Attention of rotated ``queries [B, H, L, d]`` over all they may see, by ``attention``.

        ``last_only`` gives the last token's.
        """
        ...


class PrefillView:
    """Tokens from column ``start`` on, in all rows.

    Args:
        first: columns before this one are out of every token's sight.
        mask: over the columns from ``first`` on.
    """

    def __init__(
        self,
        storage: KVStorage,
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

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._layers[layer] = self._storage.put(self._layers[layer], self._start, keys, values)

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        mask = self._mask
        if last_only:
            queries = queries[:, :, -1:]
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        return self._storage.attend(self._layers[layer], self._first, self._end, queries, scale, mask, attention)


class RingPrefillView:
    """Tokens from place ``start`` on, in all rows, of which some take the columns of tokens that are out of sight.

    They see each other and what the columns held before them; what they overwrite is copied for as long as that takes, a layer
    at a time.
    """

    def __init__(
        self,
        storage: KVStorage,
        layers: list[LayerArrays],
        window: Window,
        start: int,
        length: int,
        padding: mx.array | None,
        frequencies: mx.array | None,
    ) -> None:
        self.positions: int | mx.array = start if padding is None else start - padding
        self.frequencies = frequencies
        self._storage, self._layers, self._window = storage, layers, window
        self._start, self._length = start, length
        self._seen: LayerArrays = ()
        queries = mx.arange(start, start + length)
        self._held_columns = min(start, layers[0][0].shape[2])
        keys = (
            mx.concatenate([window.places(self._held_columns, mx.array([start - 1]))[0], queries]) if start else queries
        )
        self._mask = causal_mask(keys, queries[None], padding, window)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        new = self._storage.pack(keys, values)
        held = self._layers[layer]
        self._seen = joined(held, self._held_columns, new)
        for first, column, count in self._window.runs(self._start, self._length):
            held = written(held, column, tuple(array[:, :, first : first + count] for array in new))
        self._layers[layer] = held

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        seen, self._seen = self._seen, ()
        mask = self._mask
        if last_only:
            queries, mask = queries[:, :, -1:], mask[:, :, -1:]
        return self._storage.attend(seen, 0, seen[0].shape[2], queries, scale, mask, attention)


class DecodeView:
    """``length`` tokens a row from place ``lengths[row]`` on; ``layers`` is replaced, layer by layer.

    Args:
        lengths: ``[B]`` int32, tokens that came before, padding included.
        padding: ``[B]`` int32, how many of them at the start hold nothing; None when there are none.
        window: at most ``window.slack + 1`` tokens are computed at once.
    """

    def __init__(
        self,
        storage: KVStorage,
        layers: list[LayerArrays],
        lengths: mx.array,
        padding: mx.array | None,
        length: int,
        window: Window | None,
        frequencies: mx.array | None,
    ) -> None:
        self.positions: mx.array = lengths if padding is None else lengths - padding
        self.frequencies = frequencies
        self._storage, self.layers = storage, layers
        self._capacity = layers[0][0].shape[2]
        places = lengths[:, None] + mx.arange(length)
        if window is None:
            self._columns, keys = places, mx.arange(self._capacity)
        else:
            self._columns, keys = window.columns_of(places), window.places(self._capacity, lengths + (length - 1))
        self._mask = causal_mask(keys, places, padding, window)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self.layers[layer] = self._storage.scatter(self.layers[layer], self._columns, keys, values)

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        mask = self._mask
        if last_only:
            queries, mask = queries[:, :, -1:], mask[:, :, -1:]
        return self._storage.attend(self.layers[layer], 0, self._capacity, queries, scale, mask, attention)
