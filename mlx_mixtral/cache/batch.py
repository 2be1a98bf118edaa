"""The cache of a batch whose rows join and leave between steps: rows of about the same length share arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice, choice_of
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.mirror import Mirror
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.cache.storage import KVStorage, LayerArrays, grown
from mlx_mixtral.cache.window import Window

__all__ = ["SPREAD", "BatchCache", "RowGroup"]

SPREAD = 2.0
"""Rows share arrays while the longest has less than so many times the columns of the shortest, in whole steps."""


@dataclass(eq=False)
class HeldRow:
    """What a row has in the cache: ``taken`` tokens; ``written`` is the most there were before some were taken back.

    ``adapter`` is the number of the one it is computed with.
    """

    taken: int
    written: int
    adapter: int | None = None


@dataclass(eq=False)
class RowGroup:
    """Rows that lie in the same arrays ``[R, KV, capacity, …]``, which a step takes for one dense batch."""

    rows: list[HeldRow]
    layers: list[LayerArrays]
    padding: mx.array | None = None
    """Always None: a row begins in the first column."""
    _lengths: mx.array | None = field(default=None, init=False)

    @property
    def capacity(self) -> int:
        """Columns of each row."""
        return self.layers[0][0].shape[2]

    @property
    def lengths(self) -> mx.array:
        """Tokens of each row, ``[R]`` int32."""
        if self._lengths is None:
            self._lengths = mx.array([row.taken for row in self.rows], mx.int32)
        return self._lengths

    def advance(self, L: int, lengths: mx.array | None = None) -> None:
        """Count ``L`` tokens more in every row; ``lengths`` as a step left them."""
        for row in self.rows:
            row.taken += L
            row.written = max(row.written, row.taken)
        self._lengths = lengths

    def forget_lengths(self) -> None:
        """Rows were taken back: their lengths are those counted here."""
        self._lengths = None


class BatchCache:
    """Keys and values of all layers for rows of different lengths: a row's next token goes behind its own last one.

    Rows are told apart by their place, which changes when others leave. In one array every row has the columns of the longest:
    seven rows of 500 tokens beside one of 16,384 would take 6.7 times what they hold, and attention would read it all. So rows
    lie in groups by the power of two that their columns fall under, each an array of its own, and a step computes attention
    group by group. An array a row would save little more, and pay with kernels for every row where all are of one length, the
    usual case, which is one group: see docs/architecture.md. Joining, leaving and growing copy the groups they concern, a layer
    at a time.

    Args:
        storage, window: as of the caches that will join.
        spread: how many times the columns of its shortest row a group's longest may have; None for a group a row, infinity for
            one group.
        mirror: told of every change, where other machines hold their part of it.
    """

    def __init__(
        self,
        storage: KVStorage,
        window: Window | None,
        *,
        spread: float | None = SPREAD,
        mirror: Mirror | None = None,
    ) -> None:
        self.storage, self.window = storage, window
        self.groups: list[RowGroup] = []
        self._rows: list[HeldRow] = []
        self._spread = spread
        self._orders: tuple[mx.array, mx.array] | None = None
        self.mirror = mirror
        if mirror is not None:
            mirror.made("batch", self, None)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def taken(self) -> list[int]:
        """Tokens of each row."""
        return [row.taken for row in self._rows]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.taken, default=0)

    @property
    def columns(self) -> int:
        """Columns of all rows together, as they are allocated."""
        return sum(len(group.rows) * group.capacity for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for group in self.groups for layer in group.layers for array in layer)

    @property
    def parts(self) -> Sequence[RowGroup]:
        """What a step computes as dense batches, one after the other."""
        return self.groups

    @property
    def adapter(self) -> AdapterChoice:
        """Whose adapters the rows are computed with, as they lie in ``parts``: those of one adapter side by side."""
        return choice_of(row.adapter for group in self.groups for row in group.rows)

    @property
    def orders(self) -> tuple[mx.array, mx.array] | None:
        """Places of the rows as they lie in ``parts``, and the way back, ``[B]``; None where they lie in their own order."""
        if self._orders is None and len(self.groups) > 1:
            place = {id(row): index for index, row in enumerate(self._rows)}
            lying = [place[id(row)] for group in self.groups for row in group.rows]
            back = sorted(range(len(lying)), key=lying.__getitem__)
            self._orders = mx.array(lying), mx.array(back)
        return self._orders

    def columns_with(self, joining: Sequence[int], more: int = 1) -> int:
        """Columns there will be at most when rows of ``joining`` tokens have come and every row has ``more`` tokens more.

        Adapters are left out of account: rows that share no arrays because of them have no more columns for that.
        """
        rows = [*self._rows, *(HeldRow(taken, taken) for taken in joining)]
        groups: dict[Hashable, list[int]] = {}
        for row in rows:
            groups.setdefault(self._length_key(row, more), []).append(self._columns(row.taken + more))
        return sum(len(columns) * max(columns) for columns in groups.values())

    def reserve(self, rows: int, L: int) -> None:
        """Make room for ``L`` tokens more in every row; rows that outgrow their group go over to another."""
        assert rows == self.rows, (rows, self.rows)
        if any(self._columns(max(row.taken for row in group.rows) + L) > group.capacity for group in self.groups):
            self._arrange(self.groups, L)

    def join(self, cache: KVCache, members: Sequence[tuple[int, int]], *, keep: bool = False) -> None:
        """Add rows of ``cache`` behind those there are: pairs of a row, which may come several times, and its tokens.

        What a row has behind its tokens is forgotten. The arrays are taken and ``cache`` is empty, unless ``keep``.
        """
        assert cache.padding is None
        source = RowGroup([], list(cache.layers))
        if not keep:
            cache.layers = []
        places: dict[int, tuple[RowGroup, int]] = {}
        for place, tokens in members:
            row = HeldRow(tokens, cache.written if tokens == cache.length else tokens, cache.adapter)
            self._rows.append(row)
            places[id(row)] = (source, place)
        self._arrange([*self.groups, source], 1, places)
        if self.mirror is not None:
            self.mirror.did("join", self, cache, keep, *(number for member in members for number in member))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; the order stays, the places close up."""
        if list(rows) == list(range(self.rows)):
            return
        self._rows = [self._rows[row] for row in rows]
        self._arrange(self.groups, 1)
        if self.mirror is not None:
            self.mirror.did("keep", self, None, *rows)

    def extract(self, row: int) -> KVCache:
        """A cache of its own of what a row holds: a copy, which is lazy and to be evaluated before the next step."""
        held = self._rows[row]
        group = next(group for group in self.groups if held in group.rows)
        place, used = group.rows.index(held), self._bounded(held.taken)
        layers = [tuple(mx.contiguous(array[place : place + 1, :, :used]) for array in layer) for layer in group.layers]
        cache = KVCache(len(layers), 1, 1, window=self.window, storage=self.storage)
        cache.adopt(layers, held.taken, written=held.written)
        cache.adapter = held.adapter
        if self.mirror is not None:
            cache.mirror = self.mirror
            self.mirror.made("extract", cache, self, row)
        return cache

    def take_back(self, row: int) -> None:
        """Forget the last token of a row."""
        held = self._rows[row]
        held.taken -= 1
        for group in self.groups:
            if held in group.rows:
                group.forget_lengths()
        if self.mirror is not None:
            self.mirror.did("take_back", self, None, row)

    def _bounded(self, columns: int) -> int:
        return columns if self.window is None else min(columns, self.window.columns)

    def _columns(self, tokens: int) -> int:
        """Columns that so many tokens are given."""
        return self._bounded(-(-tokens // STEP_TOKENS) * STEP_TOKENS)

    def _key(self, row: HeldRow, more: int) -> Hashable:
        """Equal for rows that share a group once they have ``more`` tokens more."""
        return row.adapter, self._length_key(row, more)

    def _length_key(self, row: HeldRow, more: int) -> Hashable:
        if self._spread is None:
            return id(row)
        if math.isinf(self._spread):
            return 0
        steps = -(-self._columns(row.taken + more) // STEP_TOKENS)
        return math.ceil(math.log(steps, self._spread) - 1e-9)

    def _arrange(
        self, sources: Sequence[RowGroup], more: int, places: dict[int, tuple[RowGroup, int]] | None = None
    ) -> None:
        """Put the rows into groups with room for ``more`` tokens each, out of the arrays of ``sources``.

        ``places`` says where rows lie that ``sources`` do not name.
        """
        found = {id(row): (source, index) for source in sources for index, row in enumerate(source.rows)}
        found |= places or {}
        members: dict[Hashable, list[HeldRow]] = {}
        for row in self._rows:
            members.setdefault(self._key(row, more), []).append(row)
        made, changed = [], []
        # Those of one adapter lie side by side.
        adapters = list(dict.fromkeys(row.adapter for row in self._rows))
        for rows in sorted(members.values(), key=lambda rows: adapters.index(rows[0].adapter)):
            capacity = max(self._columns(row.taken + more) for row in rows)
            source = found[id(rows[0])][0]
            if source.rows == rows and source.capacity == capacity:
                made.append(source)
                continue
            made.append(group := RowGroup(rows, []))
            changed.append((group, capacity))
        kept = {id(group) for group in made}
        for layer in range(len(sources[0].layers) if sources else 0):
            for group, capacity in changed:
                group.layers.append(self._gathered(group.rows, found, layer, capacity))
            mx.eval([group.layers[layer] for group, _ in changed])
            for source in sources:
                if id(source) not in kept:
                    source.layers[layer] = ()
        self.groups, self._orders = made, None

    def _gathered(
        self, rows: Sequence[HeldRow], found: dict[int, tuple[RowGroup, int]], layer: int, capacity: int
    ) -> LayerArrays:
        """One layer of ``rows``, with ``capacity`` columns."""
        parts: list[LayerArrays] = []
        for source, run in itertools.groupby((found[id(row)] for row in rows), key=lambda place: place[0]):
            held, wanted = source.layers[layer], [index for _, index in run]
            if wanted != list(range(held[0].shape[0])):
                held = tuple(array[mx.array(wanted)] for array in held)
            there = held[0].shape[2]
            if there > capacity:
                held = tuple(array[:, :, :capacity] for array in held)
            elif there < capacity:
                held = grown(held, self.storage.empty(len(wanted), capacity - there))
            parts.append(held)
        return (
            parts[0] if len(parts) == 1 else tuple(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
        )
