"""Which expert makes room for another: replacement in one bank of slots.

A policy is told of every use and asked for victims; the bank says who is a candidate, for an expert needed by the token at
hand never is. On Mixtral, routing is near uniform and repeats come from neighbouring tokens (arXiv 2401.04088, Table 5), so
the least recently used expert is the one to give up; ``LFU`` is there for models with favourites, ``Optimal`` to measure both
against. Keys are hashable: an expert's number, or (layer, expert) where layers share a bank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Sequence
from math import inf
from typing import Protocol, TypeVar

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["LFU", "LRU", "POLICIES", "Optimal", "Policy", "make_policy"]

Key = TypeVar("Key", bound=Hashable)


class Policy(Protocol):
    """Replacement in one bank. Same calls, same victims: nothing here is random."""

    def touch(self, key: Hashable) -> None:
        """``key`` is used, or was loaded to be used, now."""

    def victim(self, candidates: Collection[Key]) -> Key:
        """Which of ``candidates``, at least one, to give up; it stays known until ``forget``."""

    def forget(self, key: Hashable) -> None:
        """``key`` is in the bank no longer."""


class LRU:
    """Gives up the key that was not used for the longest time."""

    def __init__(self) -> None:
        self._now = 0
        self._used: dict[Hashable, int] = {}

    def touch(self, key: Hashable) -> None:
        self._now += 1
        self._used[key] = self._now

    def victim(self, candidates: Collection[Key]) -> Key:
        return min(candidates, key=lambda key: self._used.get(key, 0))

    def forget(self, key: Hashable) -> None:
        self._used.pop(key, None)


class LFU:
    """Gives up the key that was used least often, uses of long ago counting less: half after ``half_life`` touches.

    Ageing lets it adapt to a new text (Lee et al., "LRFU", IEEE Trans. Computers 50(12), 2001, with a half-life for their
    lambda). Counts outlive ``forget``, or an expert that comes back would always be the next to go; a model has few experts.
    """

    def __init__(self, half_life: float = 64.0) -> None:
        if not half_life > 0:
            raise InvalidRequestError(f"half_life is {half_life!r}; it must be more than zero touches")
        self.half_life = half_life
        self._now = 0
        self._counts: dict[Hashable, tuple[float, int]] = {}  # aged count at a time

    def touch(self, key: Hashable) -> None:
        self._now += 1
        self._counts[key] = (self._count(key) + 1.0, self._now)

    def victim(self, candidates: Collection[Key]) -> Key:
        # Of equally frequent keys the one used longest ago.
        return min(candidates, key=lambda key: (self._count(key), self._counts.get(key, (0.0, 0))[1]))

    def forget(self, key: Hashable) -> None:
        """Counts are kept."""

    def _count(self, key: Hashable) -> float:
        count, at = self._counts.get(key, (0.0, self._now))
        return count * float(0.5 ** ((self._now - at) / self.half_life))


class Optimal:
    """Gives up the key that is needed again last: the best any policy can do, knowing the ``future``.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.

    Args:
        future: all keys in the order in which they will be touched.
    """

    def __init__(self, future: Sequence[Hashable]) -> None:
        self._now = 0
        self._uses: dict[Hashable, list[int]] = {}
        for position, key in enumerate(future):
            self._uses.setdefault(key, []).append(position)

    def touch(self, key: Hashable) -> None:
        self._now += 1

    def victim(self, candidates: Collection[Key]) -> Key:
        return max(candidates, key=self._next_use)

    def forget(self, key: Hashable) -> None:
        """The future stays what it is."""

    def _next_use(self, key: Hashable) -> float:
        uses = self._uses.get(key, [])
        following = bisect_left(uses, self._now)
        return uses[following] if following < len(uses) else inf


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU}


def make_policy(name: str) -> Policy:
    """A new policy by its name.

    Raises:
        InvalidRequestError: there is none of that name.
    """
    if name not in POLICIES:
        raise InvalidRequestError(f"expert replacement policy {name!r} is unknown; use one of {', '.join(POLICIES)}")
    return POLICIES[name]()
