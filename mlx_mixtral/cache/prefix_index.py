"""Sequences of tokens in their order, so that what begins like another one is found without looking at all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["PrefixIndex", "SequenceKey", "adapter_of", "common_prefix", "sequence_key", "tokens_of"]

SequenceKey = bytes
"""Tokens as big-endian numbers of 4 bytes: they are in order when these bytes are. The first one tells an adapter instead."""
_WIDTH = 4


def sequence_key(tokens: Sequence[int], adapter: int | None = None) -> SequenceKey:
    """Of tokens whose keys and values were computed with an adapter, by its number; None for the model itself."""
    return np.asarray([0 if adapter is None else adapter + 1, *tokens], ">u4").tobytes()


def tokens_of(key: SequenceKey) -> list[int]:
    found: list[int] = np.frombuffer(key, ">u4")[1:].tolist()
    return found


def adapter_of(key: SequenceKey) -> int | None:
    first = int(np.frombuffer(key, ">u4", 1)[0])
    return first - 1 if first else None


def common_prefix(a: SequenceKey, b: SequenceKey) -> int:
    """Numbers that both begin with."""
    length = min(len(a), len(b)) // _WIDTH
    differ = np.frombuffer(a, "<u4", length) != np.frombuffer(b, "<u4", length)
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


class PrefixIndex:
    """Different sequences, sorted. Those that begin alike lie side by side, so one that is not there has its likest next to it.

    Finding, adding and removing compare as many sequences as the logarithm of how many there are.
    """

    def __init__(self) -> None:
        self._keys: list[SequenceKey] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: SequenceKey) -> None:
        """Put in a sequence that is not there."""
        insort(self._keys, key)

    def remove(self, key: SequenceKey) -> None:
        """Take out a sequence that is there."""
        place = bisect_left(self._keys, key)
        assert self._keys[place] == key
        del self._keys[place]

    def clear(self) -> None:
        self._keys.clear()

    def likest(self, key: SequenceKey, most: int) -> tuple[SequenceKey, int] | None:
        """The sequence that begins like ``key`` for the most numbers, up to ``most``, and for how many; None where none does.

        Of several that do, one that ends there if there is one.
        """
        key = key[: _WIDTH * max(most, 0)]
        place = bisect_left(self._keys, key)
        beside = [(common_prefix(other, key), other) for other in self._keys[max(place - 1, 0) : place + 1]]
        shared = max((length for length, _ in beside), default=0)
        if not shared:
            return None
        first = self._keys[bisect_left(self._keys, key[: _WIDTH * shared])]
        return min((first, *(other for length, other in beside if length == shared)), key=len), shared

    def beginnings(self, key: SequenceKey) -> Iterator[SequenceKey]:
        """Every sequence that ``key`` begins with, itself included, the longest first."""
        length, place = len(key), bisect_left(self._keys, key)
        if place < len(self._keys) and self._keys[place] == key:
            yield key
        # What lies between a beginning and ``key`` begins with it as well: nothing before the common part can be skipped over.
        while place:
            before = self._keys[place - 1]
            length = _WIDTH * common_prefix(before, key[:length])
            if not length:
                return
            if len(before) == length:
                yield before
                place -= 1
                continue
            place = bisect_left(self._keys, key[:length], hi=place)
            if self._keys[place] == key[:length]:
                yield self._keys[place]
