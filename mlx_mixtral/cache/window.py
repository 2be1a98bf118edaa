"""A cache of bounded size: which tokens are in sight, and which column a token is in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["Window", "causal_mask"]

SLACK_TOKENS = 32
COLUMN_MULTIPLE = 32
NOWHERE = 2**30
"""Place of a column that holds nothing: after every token."""


@dataclass(frozen=True)
class Window:
    """Every token sees ``size`` tokens at most: the first ``sinks`` of the sequence and the last ones, itself included.

    Sinks are what attention falls back on where nothing else fits; without them a model loses its thread as soon as its
    first tokens are out of sight (StreamingLLM, arXiv 2309.17453). Positions stay those of the whole sequence.

    A token's place is how many came before it, padding included. Sinks have columns of their own; behind them the other
    columns are a ring. With ``size`` 6 and 2 sinks, were there no slack, the places 0 to 8 would lie as ``0 1 6 7 8 5``. The
    slack is room for some tokens more than are in sight, so that a few of the last can be taken back, or computed together:
    what they overwrote was out of sight already.

    Raises:
        InvalidRequestError: no more tokens than sinks.
    """

    size: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.size <= self.sinks:
            raise InvalidRequestError(
                f"a KV cache of {self.size} tokens with {self.sinks} attention sinks is not possible; the size has to be "
                "larger than the sinks, which are 0 or more"
            )

    @property
    def columns(self) -> int:
        """Columns allocated when the window is full."""
        return -(-(self.size + SLACK_TOKENS) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    @property
    def slack(self) -> int:
        """Tokens that can be taken back at any time; one more can be written at once."""
        return self.columns - self.size

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where ``count`` tokens from ``start`` on go: ``(first token, column, tokens)``; what none will see is left out."""
        sinks, ring, end = self.sinks, self.columns - self.sinks, start + count
        if start < sinks:
            yield 0, start, min(end, sinks) - start
        place = max(start, sinks, end - ring)
        while place < end:
            column = sinks + (place - sinks) % ring
            run = min(end - place, self.columns - column)
            yield place - start, column, run
            place += run

    def columns_of(self, places: mx.array) -> mx.array:
        """The columns of ``places``, any shape."""
        return mx.where(places < self.sinks, places, self.sinks + (places - self.sinks) % (self.columns - self.sinks))

    def places(self, capacity: int, last: mx.array) -> mx.array:
        """Places ``[B, capacity]`` of what the first ``capacity`` columns hold, each row's last token being at ``last [B]``."""
        sinks, ring = self.sinks, self.columns - self.sinks
        column, last = mx.arange(capacity)[None], last[:, None]
        held = last - (last - column) % ring
        first = mx.where(column > last, NOWHERE, column)
        return mx.where(column < sinks, first, mx.where(held < sinks, NOWHERE, held))


def causal_mask(keys: mx.array, queries: mx.array, padding: mx.array | None, window: Window | None) -> mx.array:
    """Which of the places ``keys [T]`` or ``[B, T]`` those at ``queries [B, L]`` may see, ``[B, 1, L, T]`` boolean."""
    queries = queries[:, None, :, None]
    if keys.ndim == 2:
        keys = keys[:, None, None, :]
    allowed = keys <= queries
    if window is not None:
        in_sight = keys > queries - (window.size - window.sinks)
        allowed = allowed & (in_sight | (keys < window.sinks) if window.sinks else in_sight)
    if padding is None:
        return allowed
    # A padding token attends to itself: a row of a softmax without any key would be NaN, and spread.
    return (allowed & (keys >= padding[:, None, None, None])) | (keys == queries)
