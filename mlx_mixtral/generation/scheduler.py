"""Several generations at once: they join and leave between steps, each ends on its own, and one forward serves them all.

A step of a batch reads the weights once for all its rows, and each expert once for all rows that chose it. Requests wait in
one queue and are admitted in its order: one that does not fit yet is not overtaken, so that none waits for ever. Prompts are
computed a chunk between two steps, so a long one delays the others by a chunk at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.cache.batch import BatchCache
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.errors import ContextLengthError
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import read_token
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.prefill import Prefilled, prefill
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled
from mlx_mixtral.generation.stats import Token

__all__ = ["Scheduler"]

# Prompts of different lengths are computed together when padding adds no more than this share, or so many tokens a row.
PADDING_SHARE, PADDING_TOKENS = 0.25, 64
MIN_CHUNK_TOKENS = 32


@dataclass
class _Row:
    ticket: int
    request: Request
    meter: Meter
    unread: Sampled | None = None
    made: int = 0
    is_finished: bool = False
    columns: int = 0
    """Columns of cache it takes by its end, padding included, in whole steps."""
    is_alone: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether a token follows the one that is read next."""
        return not self.is_finished and self.made + 1 < self.request.max_tokens


@dataclass
class _Prefill:
    """Prompts that are being computed together, aligned at their ends."""

    rows: list[_Row]
    length: int
    """Tokens of the longest prompt."""
    cache: KVCache
    chunks: Iterator[Prefilled]


class Scheduler:
    """Carries out requests on one model. Use it from one thread at a time, and nothing else of the model meanwhile.

    Args:
        max_rows: generations at once.
        max_columns: rows times columns of cache, as a memory budget allows; None for no limit.
        max_tokens: tokens of a sequence that room is made for at once; None for no limit.
    """

    def __init__(
        self, context: DecodeContext, *, max_rows: int, max_columns: int | None = None, max_tokens: int | None = None
    ) -> None:
        self._context, self._model = context, context.model
        self._max_rows, self._max_columns, self._max_tokens = max_rows, max_columns, max_tokens
        window = self._model.kv.window(self._model.config)
        # Sinks are the first tokens of each row, and have to lie in the same columns.
        self._pads = window is None or not window.sinks
        self._waiting: deque[_Row] = deque()
        self._prefilling: _Prefill | None = None
        self._rows: list[_Row] = []
        self._cache: BatchCache | None = None
        self._last = mx.zeros(0, mx.int32)
        self._tickets = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._waiting and not self._rows and self._prefilling is None

    @property
    def running(self) -> int:
        """Rows that are being generated or whose prompts are being computed."""
        return len(self._rows) + (len(self._prefilling.rows) if self._prefilling else 0)

    def submit(self, request: Request) -> int:
        """Put a request at the end of the queue; returns its ticket.

        Raises:
            ContextLengthError: it would not fit even alone.
        """
        # The last token is never fed.
        columns = self._columns(len(request.tokens) + request.max_tokens - 1)
        if self._max_columns is not None and columns > self._max_columns:
            raise ContextLengthError(
                f"a row of {len(request.tokens)} prompt tokens and up to {request.max_tokens} more needs KV cache for "
                f"{columns}; the memory budget holds {self._max_columns}: reserve more with context=, or generate fewer"
            )
        self._tickets += 1
        self._waiting.append(_Row(self._tickets, request, Meter(self._model, request)))
        return self._tickets

    def finish(self, ticket: int) -> None:
        """End a generation before its last token: it leaves before the next step. Unknown tickets are ignored."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        computing = self._prefilling.rows if self._prefilling else []
        for row in (*self._rows, *computing):
            if row.ticket == ticket:
                row.is_finished = True

    def step(self) -> list[tuple[int, Token]]:
        """A token of every running row, with its ticket; rows that got their last one are gone.

        Raises:
            CheckpointError: an expert cannot be read; the scheduler is of no more use.
        """
        with mx.stream(self._context.stream):
            self._keep([place for place, row in enumerate(self._rows) if not row.is_finished])
            if self._rows and self._rows[0].unread is None:
                self._advance()
            self._prefill()
            reading = [(row, row.unread) for row in self._rows if not row.is_finished]
            self._keep([place for place, row in enumerate(self._rows) if row.goes_on])
            # A forward that waits for experts would wait for these tokens too: nothing is gained by starting it early.
            if self._model.is_streamed or any(row.request.sampler.reads_tokens for row in self._rows):
                for row in self._rows:
                    row.unread = None
            elif self._rows:
                self._advance()
        return [(row.ticket, self._read(row, sampled)) for row, sampled in reading if sampled is not None]

    @staticmethod
    def _read(row: _Row, sampled: Sampled) -> Token:
        token = read_token(sampled)
        row.made += 1
        row.meter.count(row.made)
        return token

    def _is_alone(self, request: Request) -> bool:
        """Whether a row may get so long that its rotary frequencies are others than those of the rows beside it."""
        return self._model.config.rope.table_of(len(request.tokens) + request.max_tokens) != 0

    def _columns(self, tokens: int) -> int:
        return self._model.kv.columns(self._model.config, tokens)

    def _keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these."""
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in places]
        self._last = self._last[mx.array(list(places))] if places else mx.zeros(0, mx.int32)
        assert self._cache is not None
        self._cache.keep(places)

    def _advance(self) -> None:
        """Schedule the next token of every row."""
        assert self._cache is not None
        logits = self._context.step(self._last[:, None], self._cache)[:, -1]
        self._last = self._sample(self._rows, logits)
        mx.async_eval(self._last, *[array for row in self._rows if row.unread for array in row.unread.arrays])

    @staticmethod
    def _sample(rows: Sequence[_Row], logits: mx.array) -> mx.array:
        """A token for each row of ``logits [B, V]``; returns them, ``[B]``. Rows that want the likeliest share a kernel."""
        is_plain = [row.request.sampler.is_plain for row in rows]
        likeliest = mx.argmax(logits.astype(mx.float32), axis=-1) if any(is_plain) else None
        for place, row in enumerate(rows):
            if likeliest is not None and is_plain[place]:
                row.unread = Sampled(likeliest[place : place + 1])
            else:
                row.unread = row.request.sampler(logits[place : place + 1])
        if likeliest is not None and all(is_plain):
            return likeliest
        return mx.concatenate([row.unread.token for row in rows if row.unread is not None])

    def _prefill(self) -> None:
        """Compute a chunk of the prompts whose turn it is, or all of them while nobody waits for a step."""
        while True:
            if self._prefilling is None:
                self._prefilling = self._admit()
            if self._prefilling is None:
                return
            self._compute_chunk(self._prefilling)
            if self._rows:
                return

    def _compute_chunk(self, prompts: _Prefill) -> None:
        done, hidden = next(prompts.chunks)
        if hidden is None:
            for row in prompts.rows:
                if row.request.on_prefill is not None:
                    total = len(row.request.tokens)
                    row.request.on_prefill(max(0, total - (prompts.length - done)), total)
            return
        tokens = self._sample(prompts.rows, self._model.head(hidden[:, -1]))
        mx.async_eval(tokens)
        self._prefilling = None
        if self._cache is None:
            self._cache = BatchCache(prompts.cache.storage, prompts.cache.window)
        self._cache.join(prompts.cache)
        self._last = mx.concatenate([self._last, tokens]) if self._rows else tokens
        self._rows += prompts.rows

    def _admit(self) -> _Prefill | None:
        """The next requests that fit, as many as go together well; None when the first in the queue has to wait."""
        chosen: list[_Row] = []
        while self._waiting and self._fits([*chosen, self._waiting[0]]):
            chosen.append(self._waiting.popleft())
        if not chosen:
            return None
        longest = max(len(row.request.tokens) for row in chosen)
        padding = [longest - len(row.request.tokens) for row in chosen]
        for row in chosen:
            row.columns = self._columns(longest + row.request.max_tokens - 1)
            row.is_alone = self._is_alone(row.request)
        padded = [[0] * pad + list(row.request.tokens) for pad, row in zip(padding, chosen, strict=True)]
        cache = self._model.make_cache(padding, max_tokens=self._max_tokens)
        chunk = max(MIN_CHUNK_TOKENS, self._context.chunk_tokens // len(chosen))
        return _Prefill(chosen, longest, cache, prefill(self._model, mx.array(padded, mx.int32), cache, chunk))

    def _fits(self, joining: Sequence[_Row]) -> bool:
        count = len(self._rows) + len(joining)
        if count > 1 and (
            any(row.is_alone for row in self._rows) or any(self._is_alone(row.request) for row in joining)
        ):
            return False
        lengths = [len(row.request.tokens) for row in joining]
        waste = len(lengths) * max(lengths) - sum(lengths)
        if waste and not self._pads:
            return False
        if waste > max(PADDING_SHARE * sum(lengths), PADDING_TOKENS * (len(lengths) - 1)):
            return False
        if self._max_columns is None:
            return count <= self._max_rows
        # All rows have the columns of the longest; padding counts.
        most = self._columns(max(row.request.max_tokens for row in joining) + max(lengths) - 1)
        columns = max([most, *(row.columns for row in self._rows)])
        return count <= self._max_rows and count * columns <= self._max_columns
