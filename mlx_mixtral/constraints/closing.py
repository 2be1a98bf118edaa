"""The way to the end: tokens that make a text whole from where it is, found by trying what closes.

The search is greedy. It need not find the shortest way, only a way: a token stays where one is known behind it that fits what
is left of ``max_tokens``. Of a way that is too long for that, other steps are tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlx_mixtral.constraints.token_table import TokenTable

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["MAX_WAY_TOKENS", "Closing", "ClosingRanks"]

MAX_WAY_TOKENS = 4096
# Ends of the way known before that are tried after a token: it may be part of what is closed next, or close some of it.
MAX_ENDS = 4
MAX_LAST = 32
"""Tokens tried as the last one at each step, where nothing is known of the grammar."""
MAX_BRANCHES = 8
"""Other steps tried at each place of a way that is too long."""

Way = list[int]


class Steps(Enum):
    """Which token is taken next."""

    CLOSING = "what closes most"
    CLOSING_BYTES = "what closes, byte by byte: no token begins something with what it closes"
    LEAST_USED = "what begins as the fewest did"


class Closing:
    """Finds ways to the end of a grammar's texts.

    Args:
        is_json: closing quotes and brackets are what ends them.
        examples: texts that a part of them may be, of JSON strings between their quotes.
    """

    def __init__(
        self, vocabulary: TokenTable, ranks: ClosingRanks, *, is_json: bool, examples: Sequence[str] = ()
    ) -> None:
        self._vocabulary, self._ranks, self._is_json = vocabulary, ranks, is_json
        self._examples = [vocabulary.table.tokenize_str(text + '"' * is_json) for text in examples]
        self._masks_left, self._until_s = 0, math.inf

    def find(
        self, matcher: LLMatcher, max_tokens: int, before: Way | None = None, *, until_s: float = math.inf
    ) -> Way | None:
        """Tokens after which the text may end, at most ``max_tokens``; None where no way was found.

        Args:
            before: a way from the place one token earlier.
            until_s: when to give up, as ``time.monotonic`` tells it.
        """
        self._until_s = until_s
        limit = min(max_tokens, MAX_WAY_TOKENS)
        ends = [] if before is None else [before[start:] for start in range(min(MAX_ENDS, len(before)))]
        for how in Steps if self._is_json else (Steps.LEAST_USED,):
            way = self._follow(matcher, limit, ends, how)
            if way is not None:
                return way
        return None

    def shorten(self, matcher: LLMatcher, way: Way, max_tokens: int, max_masks: int) -> Way:
        """``way``, or a shorter one among its neighbours, until it has at most ``max_tokens``.

        Args:
            max_masks: masks computed for it, some 20 microseconds each.
        """
        self._masks_left = max_masks
        place = 0
        while place < len(way) and len(way) > max_tokens and self._masks_left > 0:
            at = matcher.deep_copy()
            at.consume_tokens(way[:place])
            for token in self._branches(at, way[place]):
                tried = at.deep_copy()
                tried.consume_token(token)
                how = Steps.CLOSING if self._is_json else Steps.LEAST_USED
                rest = self._follow(tried, len(way) - place - 2, [], how)
                if rest is not None:
                    way = [*way[:place], token, *rest]
                if self._masks_left <= 0:
                    break
            place += 1
        return way

    def leads(self, matcher: LLMatcher, tokens: Sequence[int]) -> bool:
        """Whether the text may end after ``tokens``."""
        checked = [*tokens, self._vocabulary.end_token]
        return matcher.validate_tokens(checked) == len(checked)

    def _follow(self, matcher: LLMatcher, limit: int, ends: list[Way], how: Steps) -> Way | None:
        """The way of always taking the likeliest step; the first of ``ends`` that leads on is taken with it."""
        at = matcher.deep_copy()
        way: Way = []
        used = np.zeros(256, np.int64)
        while True:
            if at.is_accepting():
                return way
            for end in ends:
                if self.leads(at, end):
                    whole = [*way, *end]
                    return whole if len(whole) <= limit else None
            if len(way) >= limit or time.monotonic() > self._until_s:
                return None
            token = self._step(at, used, how)
            if token is None:
                return None
            step = [token]
            if not self._vocabulary.tokens[token].startswith((b'"', b"}", b"]")):
                step = next((tokens for tokens in self._examples if at.validate_tokens(tokens) == len(tokens)), step)
            if not at.consume_tokens(step):
                return None
            used[self._vocabulary.first_bytes[token]] += 1
            way += step

    def allowed(self, matcher: LLMatcher) -> npt.NDArray[np.intp]:
        """Ids of tokens that may come next, those that end a text left out."""
        self._masks_left -= 1
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").view(np.bool_)
        goes_on = self._vocabulary.goes_on
        return np.flatnonzero(bits[: len(goes_on)] & goes_on)

    def _step(self, matcher: LLMatcher, used: npt.NDArray[np.int64], how: Steps) -> int | None:
        ids = self.allowed(matcher)
        if not ids.size:
            return None
        known = self._vocabulary
        if how is Steps.CLOSING_BYTES and (single := ids[known.lengths[ids] == 1]).size:
            ids = single
        if how is Steps.LEAST_USED:
            for last in self._shortest_of_each_byte(ids):
                if self.leads(matcher, [last]):
                    return last
            # What was used least leads out of every loop in the end; long tokens lead to the end of what is long.
            rank = used[known.first_bytes[ids]] * 1000 - known.lengths[ids]
        else:
            rank = (self._ranks.in_string if ids.size > known.size // 4 else self._ranks.anywhere)[ids]
        return int(ids[np.argmin(rank)])

    def _shortest_of_each_byte(self, ids: npt.NDArray[np.intp]) -> list[int]:
        """Of tokens that begin alike the shortest, for some beginnings."""
        ids = ids[np.argsort(self._vocabulary.lengths[ids], kind="stable")]
        _, firsts = np.unique(self._vocabulary.first_bytes[ids], return_index=True)
        return [int(token) for token in ids[firsts[:MAX_LAST]]]

    def _branches(self, matcher: LLMatcher, taken: int) -> list[int]:
        """Other tokens than the one taken, the likeliest of each first byte."""
        ids = self.allowed(matcher)
        ids = ids[np.argsort(self._ranks.anywhere[ids], kind="stable")]
        _, firsts = np.unique(self._vocabulary.first_bytes[ids], return_index=True)
        best = [int(ids[first]) for first in sorted(firsts)]
        longest = int(ids[np.argmax(self._vocabulary.lengths[ids])]) if ids.size else taken
        return [token for token in dict.fromkeys([*best[:MAX_BRANCHES], longest]) if token != taken]


class ClosingRanks:
    """How soon each token closes JSON, the least first; of a vocabulary once.

    Attributes:
        anywhere: ``[V]``.
        in_string: The same in a string, where what looks like a sign of JSON is part of it, ``[V]``.
    """

    def __init__(self, vocabulary: TokenTable) -> None:
        tokens = vocabulary.tokens
        self.anywhere: npt.NDArray[np.int64] = np.array([_closing_rank(data) for data in tokens], np.int64)
        ends_string = np.array([data.startswith(b'"') for data in tokens]) & (self.anywhere < 0)
        self.in_string: npt.NDArray[np.int64] = np.where(ends_string, self.anywhere, -vocabulary.lengths)


def _closing_rank(data: bytes) -> int:
    """Closing signs, then separators, digits, words and the rest; then what opens more; last what begins with white space."""
    if data and not data.strip(b'"]}'):
        return -1_000 * (1 + data.count(b"]") + data.count(b"}")) - len(data)
    if not data.strip(b'"]}:'):
        return -len(data)
    if not data.strip(b'"]}:,'):
        return 100 - len(data)
    if data.isdigit():
        return 200 + len(data) + (data != b"0")
    if data[:1].isspace():
        return 9_000
    opened = data.count(b"[") + 2 * data.count(b"{")
    # A comma is a promise of more.
    return 2_000 + opened * 1_000 + 500 * data.count(b",") + (0 if data.isalpha() else 400) - len(data)
