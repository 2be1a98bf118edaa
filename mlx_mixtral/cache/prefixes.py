"""Caches kept from one generation to the next: a prompt that begins like an earlier one is computed from where it differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache

__all__ = ["MIN_TOKENS", "PrefixStore", "common_prefix"]

MIN_TOKENS = 16
"""A shorter beginning is not worth the bookkeeping."""
MAX_LOST_TOKENS = 32
"""So many last tokens of a kept sequence are given up rather than copying all before them."""


@dataclass(frozen=True)
class KeptPrefix:
    """A sequence and its cache, which holds just its tokens, in ``nbytes``."""

    tokens: list[int]
    cache: KVCache
    nbytes: int


class PrefixStore:
    """Sequences with their caches, the one used least recently first.

    A cache is lent, not shared: it leaves the store while a generation writes into it, and comes back longer. Where a prompt
    leaves a kept sequence in its middle, the part they share is copied and the sequence stays for others.

    Args:
        limit_bytes: of all caches kept.
        has_memory: whether these bytes are there beside a running generation. Without, sequences are kept in the memory that
            generations would take, and given up when those need it; nothing is copied on the way out then.
    """

    def __init__(self, limit_bytes: int, *, has_memory: bool = True) -> None:
        self.limit_bytes, self.has_memory = limit_bytes, has_memory
        self._kept: list[KeptPrefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches kept."""
        return sum(kept.nbytes for kept in self._kept)

    def reusable(self, tokens: Sequence[int], left: int = 1) -> int:
        """How many tokens ``take`` would give."""
        found = self._best(tokens, left)
        return 0 if found is None else found[1]

    def take(self, tokens: Sequence[int], left: int = 1) -> KVCache | None:
        """A cache of the longest beginning of ``tokens`` that is kept, without the last ``left`` at least; or None."""
        found = self._best(tokens, left)
        if found is None:
            return None
        kept, shared = found
        self._kept.remove(kept)
        if self._is_lent(kept, shared):
            kept.cache.trim(len(kept.tokens) - shared)
            return kept.cache
        # Used last now.
        self._kept.append(kept)
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
        mx.eval(cache.arrays)
        # What the new one begins with, it replaces.
        self._kept = [kept for kept in self._kept if common_prefix(kept.tokens, tokens) < len(kept.tokens)]
        self._kept.append(KeptPrefix(list(tokens), cache, cache.nbytes))
        self.shrink(self.limit_bytes)

    def shrink(self, nbytes: int) -> None:
        """Give up what was used least recently until no more than ``nbytes`` are kept."""
        while self._kept and self.nbytes > nbytes:
            self._kept.pop(0)

    def clear(self) -> None:
        self._kept.clear()

    def _best(self, tokens: Sequence[int], left: int) -> tuple[KeptPrefix, int] | None:
        """Which sequence has the longest beginning, and how much of it can be had."""
        best, shared = None, MIN_TOKENS - 1
        for kept in self._kept:
            length = min(common_prefix(kept.tokens, tokens), len(tokens) - left)
            if length > shared:
                best, shared = kept, length
        if best is None:
            return None
        lost = len(best.tokens) - shared
        if lost > best.cache.trimmable or (not self._is_lent(best, shared) and not best.cache.is_whole):
            return None
        return best, shared

    def _is_lent(self, kept: KeptPrefix, shared: int) -> bool:
        """Whether the cache itself is given, and what it has more is lost."""
        return len(kept.tokens) - shared <= MAX_LOST_TOKENS or not self.has_memory


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    # Slices of lists are compared in C: halving finds the place in time that grows with the tokens, a loop in 50 times that.
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
