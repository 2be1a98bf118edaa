"""Caches kept from one generation to the next: a prompt that begins like an earlier one is computed from where it differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mixtral.cache.kv import KVCache

__all__ = ["PrefixStore", "common_prefix"]

MIN_TOKENS = 16
"""A shorter beginning is not worth the bookkeeping."""
MAX_LOST_TOKENS = 32
"""So many last tokens of a kept sequence are given up rather than copying all before them."""


@dataclass(frozen=True)
class KeptPrefix:
    """A sequence and its cache, which holds just its tokens."""

    tokens: list[int]
    cache: KVCache


class PrefixStore:
    """Sequences with their caches, the one used least recently first.

    A cache is lent, not shared: it leaves the store while a generation writes into it, and comes back longer. Where a prompt
    leaves a kept sequence in its middle, the part they share is copied and the sequence stays for others.

    Args:
        limit_bytes: of all caches kept.
        has_memory: whether these bytes are there beside a running generation. Without, one sequence is kept in the memory
            that the next generation would take, and given up when that has no use for it; nothing is copied then.
    """

    def __init__(self, limit_bytes: int, *, has_memory: bool = True) -> None:
        self.limit_bytes, self.has_memory = limit_bytes, has_memory
        self.why_not: str | None = None
        """Why the last ``take`` gave nothing though a kept sequence begins alike."""
        self._kept: list[KeptPrefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches kept."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def take(self, tokens: Sequence[int], left: int = 1) -> KVCache | None:
        """A cache of the longest beginning of ``tokens`` that is kept, without the last ``left`` at least; or None."""
        cache = self._take(tokens, left)
        if not self.has_memory:
            self.clear()
        return cache

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep ``cache``, which holds ``tokens``; the caller must not use it any more."""
        assert cache.length == len(tokens), (cache.length, len(tokens))
        if not self.has_memory:
            self.clear()
        elif cache.is_whole and 2 * len(tokens) <= cache.capacity:
            # Of a step of columns a short sequence uses few; it gets new ones when it goes on.
            cache = cache.fork(len(tokens))
        # What the new one begins with, it replaces.
        self._kept = [kept for kept in self._kept if common_prefix(kept.tokens, tokens) < len(kept.tokens)]
        self._kept.append(KeptPrefix(list(tokens), cache))
        while self._kept and self.nbytes > self.limit_bytes:
            self._kept.pop(0)

    def clear(self) -> None:
        self._kept.clear()

    def _take(self, tokens: Sequence[int], left: int) -> KVCache | None:
        best, shared = None, 0
        for kept in self._kept:
            length = min(common_prefix(kept.tokens, tokens), len(tokens) - left)
            if length > shared:
                best, shared = kept, length
        self.why_not = None
        if best is None:
            return None
        if shared < MIN_TOKENS:
            count = f"{shared} token{'s' * (shared != 1)}"
            self.why_not = f"it begins like an earlier one for {count}, and fewer than {MIN_TOKENS} are computed again"
            return None
        lost = len(best.tokens) - shared
        is_lent = lost <= MAX_LOST_TOKENS or not self.has_memory
        if lost > best.cache.trimmable or (not is_lent and not best.cache.is_whole):
            self.why_not = f"a bounded KV cache cannot go back {lost} tokens, to where it differs from an earlier one"
            return None
        self._kept.remove(best)
        if is_lent:
            best.cache.trim(lost)
            return best.cache
        # Used last now.
        self._kept.append(best)
        return best.cache.fork(shared)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))
