"""Caches kept from one generation to the next: a prompt that begins like an earlier one is computed from where it differs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.prefix_index import PrefixIndex, SequenceKey, adapter_of, sequence_key, tokens_of

__all__ = ["MIN_TOKENS", "PrefixStore"]

MIN_TOKENS = 16
"""A shorter beginning is not worth the bookkeeping."""
MAX_LOST_TOKENS = 32
"""So many last tokens of a kept sequence are given up rather than copying all before them."""


@dataclass(frozen=True)
class KeptPrefix:
    """A cache, which holds just ``length`` tokens, in ``nbytes``."""

    length: int
    cache: KVCache
    nbytes: int


class PrefixStore:
    """Sequences with their caches, the one used least recently first. Those of an adapter are sequences of their own.

    A cache is lent, not shared: it leaves the store while a generation writes into it, and comes back longer. Where a prompt
    leaves a kept sequence in its middle, the part they share is copied and the sequence stays for others.

    Args:
        limit_bytes: of all caches kept.
        has_memory: whether these bytes are there beside a running generation. Without, sequences are kept in the memory that
            generations would take, and given up when those need it; nothing is copied on the way out then.
    """

    def __init__(self, limit_bytes: int, *, has_memory: bool = True) -> None:
        self.limit_bytes, self.has_memory = limit_bytes, has_memory
        self.why_not: str | None = None
        """Why the last ``take`` gave nothing though a kept sequence begins alike."""
        self.nbytes = 0
        """Bytes of all caches kept."""
        self._kept: OrderedDict[SequenceKey, KeptPrefix] = OrderedDict()
        self._index = PrefixIndex()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sequences(self) -> list[list[int]]:
        """The tokens of all that are kept, those used least recently first."""
        return [tokens_of(key) for key in self._kept]

    def reusable(self, tokens: Sequence[int], left: int = 1, adapter: int | None = None) -> int:
        """How many tokens ``take`` would give."""
        found = self._best(tokens, left, adapter)
        return 0 if found is None else found[1]

    def take(self, tokens: Sequence[int], left: int = 1, adapter: int | None = None) -> KVCache | None:
        """A cache of the longest beginning of ``tokens`` that is kept, without the last ``left`` at least; or None.

        Only what was computed with the same ``adapter`` is.
        """
        found = self._best(tokens, left, adapter)
        if found is None:
            return None
        key, shared = found
        kept = self._kept[key]
        if self._is_lent(kept, shared):
            self._remove(key)
            kept.cache.trim(kept.length - shared)
            return kept.cache
        # Used last now.
        self._kept.move_to_end(key)
        return kept.cache.fork(shared)

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep ``cache``, which holds ``tokens`` and may be lazy; the caller must not use it any more.

        One that is larger than all that may be kept is dropped, and what there is stays.
        """
        assert cache.length == len(tokens), (cache.length, len(tokens))
        # Of a step of columns a short sequence uses few; it gets new ones when it goes on.
        is_short = self.has_memory and cache.is_whole and 2 * len(tokens) <= cache.capacity
        if (cache.nbytes * len(tokens) // cache.capacity if is_short else cache.nbytes) > self.limit_bytes:
            return
        cache = cache.fork(len(tokens)) if is_short else cache
        # It must not hold on to what it was made from. Rows that run need not wait for that, only those who borrow memory.
        (mx.async_eval if self.has_memory else mx.eval)(cache.arrays)
        key = sequence_key(tokens, cache.adapter)
        # What the new one begins with, it replaces.
        for beginning in list(self._index.beginnings(key)):
            self._remove(beginning)
        self._kept[key] = KeptPrefix(len(tokens), cache, cache.nbytes)
        self._index.add(key)
        self.nbytes += cache.nbytes
        self.shrink(self.limit_bytes)

    def shrink(self, nbytes: int) -> None:
        """Give up what was used least recently until no more than ``nbytes`` are kept."""
        while self._kept and self.nbytes > nbytes:
            self._remove(next(iter(self._kept)))

    def forget(self, adapter: int) -> None:
        """Give up what was computed with an adapter."""
        for key in [key for key in self._kept if adapter_of(key) == adapter]:
            self._remove(key)

    def clear(self) -> None:
        self._kept.clear()
        self._index.clear()
        self.nbytes = 0

    def _remove(self, key: SequenceKey) -> None:
        self.nbytes -= self._kept.pop(key).nbytes
        self._index.remove(key)

    def _best(self, tokens: Sequence[int], left: int, adapter: int | None) -> tuple[SequenceKey, int] | None:
        """Which sequence has the longest beginning, and how much of it can be had."""
        self.why_not = None
        found = self._index.likest(sequence_key(tokens, adapter), 1 + len(tokens) - left)
        # The adapter counts as one of what they have in common.
        if found is None or found[1] == 1:
            return None
        key, shared = found[0], found[1] - 1
        best = self._kept[key]
        if shared < MIN_TOKENS:
            count = f"{shared} token{'s' * (shared != 1)}"
            self.why_not = f"it begins like an earlier one for {count}, and fewer than {MIN_TOKENS} are computed again"
            return None
        lost = best.length - shared
        if lost > best.cache.trimmable or (not self._is_lent(best, shared) and not best.cache.is_whole):
            self.why_not = f"a bounded KV cache cannot go back {lost} tokens, to where it differs from an earlier one"
            return None
        return key, shared

    def _is_lent(self, kept: KeptPrefix, shared: int) -> bool:
        """Whether the cache itself is given, and what it has more is lost."""
        return kept.length - shared <= MAX_LOST_TOKENS or not self.has_memory
