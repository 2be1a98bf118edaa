"""The tokens of one forward and their place in the cache: what attention needs to know of it, and nothing else.

A ``PrefillView`` knows where it is as numbers, so that keys are sliced and most masks are none; it is how prompts enter. A
``RingPrefillView`` is one that enters a cache of bounded size and overfills it. A ``DecodeView`` knows where it is as arrays:
the same graph serves every step, and is compiled once for a size of the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.storage import Kernel, KVStorage, LayerArrays, joined, written
from mlx_mixtral.cache.window import Window, causal_mask

__all__ = ["CacheView", "DecodeView", "GroupedDecodeView", "PrefillView", "RingPrefillView"]


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

    @property
    def adapter(self) -> AdapterChoice:
        """Whose adapter the rows are computed with."""
        ...

    @property
    def ends(self) -> tuple[int, ...] | None:
        """Which token is the last of each row; None where all rows end with the last one."""
        ...

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        """Attention of rotated ``queries [B, H, L, d]`` over all they may see, by ``attention``.

        ``last_only`` gives the last token's; ``queries`` may be its alone then.
        """
        ...


class PrefillView:
    """Tokens from column ``start`` on, in all rows.

    Args:
        first: columns before this one are out of every token's sight.
        mask: over the columns from ``first`` on.
        ends: the last token of each row, where something follows it that only makes rows equally long. There are no sinks or
            padding then.
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
        ends: tuple[int, ...] | None = None,
        adapter: int | None = None,
    ) -> None:
        self.positions, self.frequencies, self.ends = positions, frequencies, ends
        self.adapter: AdapterChoice = adapter
        self._storage, self._layers = storage, layers
        self._start, self._end = start, start + length
        self._first, self._mask = first, mask

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._layers[layer] = self._storage.put(self._layers[layer], self._start, keys, values)

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        mask = self._mask
        if last_only and self.ends is not None:
            return self._attend_ends(self._layers[layer], queries, scale, attention, self.ends)
        if last_only:
            queries = queries[:, :, -1:]
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        return self._storage.attend(self._layers[layer], self._first, self._end, queries, scale, mask, attention)

    def _attend_ends(
        self, held: LayerArrays, queries: mx.array, scale: float, attention: Kernel, ends: tuple[int, ...]
    ) -> mx.array:
        """Each row's last token by itself, over as many columns as it would have alone: sums round by how many there are."""
        rows = []
        for row, end in enumerate(ends):
            own = tuple(array[row : row + 1] for array in held)
            at = 0 if queries.shape[2] == 1 else end
            seen = self._start + end + 1 - self._first
            mask = self._mask[:, :, end : end + 1, :seen] if isinstance(self._mask, mx.array) else None
            query = queries[row : row + 1, :, at : at + 1]
            rows.append(self._storage.attend(own, self._first, self._start + end + 1, query, scale, mask, attention))
        return mx.concatenate(rows)


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
        adapter: int | None = None,
    ) -> None:
        self.adapter: AdapterChoice = adapter
        self.positions: int | mx.array = start if padding is None else start - padding
        self.frequencies, self.ends = frequencies, None
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
        adapter: AdapterChoice = None,
    ) -> None:
        self.adapter = adapter
        self.positions: mx.array = lengths if padding is None else lengths - padding
        self.frequencies, self.ends = frequencies, None
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


class GroupedDecodeView:
    """Rows of several ``views``, one behind the other: each group's attention is over its own arrays."""

    def __init__(self, views: Sequence[DecodeView], adapter: AdapterChoice = None) -> None:
        self.adapter = adapter
        self.positions: mx.array = mx.concatenate([view.positions for view in views])
        self.frequencies, self.ends = views[0].frequencies, None
        self._views = views
        ends = list(itertools.accumulate(view.positions.shape[0] for view in views))
        self._spans = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

    def update(self, layer: int, keys: mx.array, values: mx.array) -> None:
        for view, span in zip(self._views, self._spans, strict=True):
            view.update(layer, keys[span], values[span])

    def attend(
        self, layer: int, queries: mx.array, scale: float, attention: Kernel, *, last_only: bool = False
    ) -> mx.array:
        return mx.concatenate(
            [
                view.attend(layer, queries[span], scale, attention, last_only=last_only)
                for view, span in zip(self._views, self._spans, strict=True)
            ]
        )
