"""Prompts of a batch: computed a chunk between two steps, as much of one as the rows that run may be kept waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.prefill import Prefilled, prefill
from mlx_mixtral.generation.rows import BatchRow, Prefixes
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["FIRST_CHUNK_TOKENS", "MIN_CHUNK_TOKENS", "ChunkPace", "PromptJob", "go_together", "taken"]

FIRST_CHUNK_TOKENS, MIN_CHUNK_TOKENS = 32, 8
# Of the time that rows may wait a chunk is meant to take so much: each is slower a token than the one before it, as it attends
# to more and is shorter, and no two take the same time.
AIMED_SHARE = 0.6
# Prompts are computed together when their ends lie within so many tokens: those are in one chunk.
MAX_SPREAD_TOKENS = 64
# What a rate measured now counts against all before.
NEWEST = 0.5


class ChunkPace:
    """How many tokens of a prompt are computed between two steps of the rows that run.

    As many as take ``AIMED_SHARE`` of ``max_stall_s`` at the rate of the chunks so far, so that a row waits for its next token
    for a step and ``max_stall_s``; ``MIN_CHUNK_TOKENS`` at least, so that a prompt comes to its end however slow the machine
    is. The first chunk of all is a short one, as no rate is known.

    Args:
        most_tokens: of a chunk, whatever the rate.
        is_whole: chunks are always as long as they may be: where experts are read for each chunk, several short ones take
            many times as long.
        clock: seconds that only go up.
    """

    def __init__(self, max_stall_s: float, most_tokens: int, *, is_whole: bool, clock: Callable[[], float]) -> None:
        self.max_stall_s, self._most_tokens, self._is_whole, self._clock = max_stall_s, most_tokens, is_whole, clock
        self._rate: float | None = None

    def tokens(self, *, is_waited_for: bool) -> int:
        """Tokens of the next chunk, of all rows together; ``is_waited_for``: rows run that wait for it."""
        if self._is_whole or not is_waited_for:
            return self._most_tokens
        if self._rate is None:
            return FIRST_CHUNK_TOKENS
        return max(MIN_CHUNK_TOKENS, min(self._most_tokens, int(self._rate * AIMED_SHARE * self.max_stall_s)))

    def timed(self, compute: Callable[[], int]) -> None:
        """Run ``compute``, which gives the tokens it computed, and learn from the time it took."""
        started = self._clock()
        tokens = compute()
        elapsed = self._clock() - started
        if tokens and elapsed > 0:
            rate = tokens / elapsed
            # A slower one counts at once, a faster one by and by: rows wait too long for the first only.
            self._rate = rate if self._rate is None else min(rate, NEWEST * rate + (1 - NEWEST) * self._rate)


class PromptJob:
    """Prompts that are being computed together, aligned at their beginnings; the shorter ones are filled up behind.

    A row's numbers are those it has alone: nothing is before its first token, and what is behind its last is out of sight.

    Args:
        cache: holds a beginning of the prompt where there is one row.
    """

    def __init__(self, model: MixtralModel, rows: Sequence[BatchRow], cache: KVCache) -> None:
        self.rows, self.cache = list(rows), cache
        self.reused = cache.length
        self.hidden: mx.array | None = None
        """``[R, 1, D]`` after the last tokens, where all is computed and the rows are to begin at the next step."""
        lengths = [len(row.tokens) - self.reused for row in rows]
        self.length = max(lengths)
        self.overtaken = 0
        self._chunk = self._done = self._chunks_done = 0
        filled = [
            [*row.tokens[self.reused :], *[0] * (self.length - length)]
            for row, length in zip(rows, lengths, strict=True)
        ]
        self._chunks = prefill(
            model,
            mx.array(filled, mx.int32),
            cache,
            lambda: self._chunk,
            lengths=None if min(lengths) == self.length else lengths,
        )

    @property
    def left(self) -> int:
        """Tokens that are still to be computed, of the longest row."""
        return self.length - self._done

    @property
    def is_long(self) -> bool:
        """Whether it took more than one chunk."""
        return self._chunks_done > 1

    @property
    def is_abandoned(self) -> bool:
        """Whether all its rows were ended."""
        return all(row.is_finished for row in self.rows)

    def compute(self, tokens: int) -> tuple[int, mx.array | None]:
        """A chunk of ``tokens`` in all rows: how many it was, and the hidden states ``[R, 1, D]`` after the last one."""
        before, self._chunk = self._done, max(1, tokens // len(self.rows))
        done: Prefilled = next(self._chunks)
        self._done = done.done
        self._chunks_done += 1
        return (self._done - before) * len(self.rows), done.hidden

    def held(self, row: BatchRow) -> int:
        """Tokens of a row's prompt that are in the cache."""
        return min(self.reused + self._done, len(row.tokens))

    def report(self) -> None:
        """Tell each row how far its prompt is; one that raises ends."""
        for row in self.rows:
            if row.request.on_prefill is not None and not row.is_finished:
                try:
                    row.request.on_prefill(self.held(row), len(row.tokens))
                except Exception as error:
                    row.fail(error)


def go_together(model: MixtralModel, lengths: Sequence[int]) -> bool:
    """Whether prompts of these lengths may be computed as one: all equal, or of about the same length.

    A window that is full keeps only the last tokens, and those would be what a row was filled up with. One so short that it is
    rounded in another way would not be, beside a longer one.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return True
    window = model.kv.window(model.config)
    if window is not None and longest > window.columns:
        return False
    return longest - shortest <= MAX_SPREAD_TOKENS and shortest >= model.min_chunk_tokens


def taken(prefixes: Prefixes | None, row: BatchRow, least: int) -> KVCache | None:
    """What was kept of a row's prompt, and of what it made before it was put back.

    ``least`` tokens of a prompt that is not kept whole are left to compute.
    """
    if prefixes is None:
        return None
    if not row.made:
        return prefixes.take(row.tokens, least, row.request.adapter)
    cache, latest = prefixes.take(row.sequence, 1, row.request.adapter), len(row.tokens) - least
    if cache is None or not latest < cache.length < len(row.tokens):
        return cache
    if cache.length - latest > cache.trimmable:
        return None
    cache.trim(cache.length - latest)
    return cache
