"""Text of several generations at once: the scheduler's tokens put together row by row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self, Unpack

import mlx.core as mx

from mlx_mixtral.arguments import is_number, shown
from mlx_mixtral.errors import ClosedError, InvalidRequestError
from mlx_mixtral.generation.rows import RowUpdate
from mlx_mixtral.generation.scheduler import DEFAULT_MAX_STALL_S
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.requests import GenerationOptions, Requests, TextRequest, with_options
from mlx_mixtral.runtime.stream import Chunk, Generation

__all__ = ["Batch", "BatchUpdate", "collect_batch", "stream_batch"]


class BatchUpdate(NamedTuple):
    """What a step gave a generation: its next chunk, the last of which has a finish reason, or the error that ended it."""

    ticket: int
    chunk: Chunk | None
    error: Exception | None = None


class Batch:
    """Generations that come and go while others run: what a server's thread drives. ``Mixtral.batch`` makes one.

    The model is busy from here on until it is closed, or dropped. Use it from one thread at a time; ``close`` may be called
    from any, and waits for the step under way.

    Args:
        max_rows: generations at once; what the plan in force allows when None: see ``Engine.default_rows``.
        max_stall_s: how long a chunk of a prompt may take while rows wait for it.

    Raises:
        InvalidRequestError: not a number of rows, or of seconds.
        BusyError, ClosedError: as for ``Mixtral.generate``.

    Example:
        >>> with model.batch() as batch:
        ...     batch.add("In the beginning", max_tokens=16)
        ...     while not batch.is_idle:
        ...         for ticket, chunk, error in batch.step():
        ...             print(ticket, error or chunk.text)
    """

    def __init__(
        self,
        engine: Engine,
        requests: Requests,
        *,
        max_rows: int | None = None,
        max_stall_s: float = DEFAULT_MAX_STALL_S,
    ) -> None:
        self._scheduler = engine.scheduler(max_rows, max_stall_s=max_stall_s)
        self._requests, self._guarded, self._adapters = requests, engine.guarded, engine.adapters
        self._open: dict[int, TextRequest] = {}
        self._turn = threading.Lock()
        self._stepping: int | None = None
        self._is_closed = False
        # A generator ends when it is dropped: so does a batch.
        self._held: Generator[None, None, None] | None = _holding(engine)
        next(self._held)
        engine.remember(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do: ``step`` would give nothing."""
        return self._scheduler.is_idle

    @property
    def running(self) -> int:
        """Generations that run, or whose prompts are being computed."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Generations in the queue."""
        return self._scheduler.waiting

    @with_options
    def add(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        timeout_s: float | None = None,
        special: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> list[int]:
        """Put ``n`` continuations of a prompt into the queue; returns their tickets. The prompt is computed once.

        Args:
            n: with a seed, the i-th (from 0) has that seed plus i: it is the text that a generation of that seed has.
            timeout_s: how long they may wait for their turn; after it they end with a QueueTimeoutError. None for ever.
            special, options: as for ``Mixtral.generate``.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError: as for ``Mixtral.generate``. Nothing was added then.
            ClosedError: the batch was closed.
        """
        if timeout_s is not None and (not is_number(timeout_s) or not timeout_s > 0):
            raise InvalidRequestError(
                f"timeout_s is {shown(timeout_s)}; it must be a number of seconds above 0, or None for ever"
            )
        own = self._requests.prompt(prompt, special=special)
        return self.add_requests(self._requests.samples(own, n, options), timeout_s=timeout_s)

    def add_requests(self, requests: Sequence[TextRequest], *, timeout_s: float | None = None) -> list[int]:
        """Put requests of one prompt into the queue, as ``Requests`` made them; returns their tickets.

        Raises:
            ContextLengthError: they do not fit the memory budget.
            InvalidRequestError: their adapter was removed meanwhile.
            ClosedError: the batch was closed.
        """
        self._check()
        for made in requests:
            self._adapters.by_number(made.request.adapter)
        tickets = self._scheduler.submit_group([made.request for made in requests], timeout_s=timeout_s)
        self._open.update(zip(tickets, requests, strict=True))
        return tickets

    def cancel(self, ticket: int) -> None:
        """End a generation, wherever it is: waiting, its prompt half computed, or running. It leaves before the next step.

        The others' texts stay what they are. Nothing more is said of it; unknown tickets are ignored.
        """
        if self._open.pop(ticket, None) is not None:
            self._scheduler.finish(ticket)

    def step(self) -> list[BatchUpdate]:
        """What every generation got next. While only prompts are computed it gives nothing after a chunk of one.

        An error ends its own generation, an expert that cannot be read those of the step that needed it; others go on.

        Raises:
            ClosedError: the batch was closed.
            RuntimeError: MLX's own, such as memory that is not there: close the batch then, and make another.
        """
        with self._turn:
            self._check()
            self._stepping = threading.get_ident()
            try:
                with self._guarded():
                    return [update for update in map(self._update, self._scheduler.step()) if update is not None]
            finally:
                self._stepping = None
                if self._is_closed:
                    self._release()

    def _update(self, update: RowUpdate) -> BatchUpdate | None:
        """Text of a token; None for one that came after the text's end."""
        ticket, token, is_last, error = update
        if (made := self._open.get(ticket)) is None:
            return None
        made.request.stats.peak_memory_bytes = mx.get_peak_memory()
        chunk = None
        if token is not None:
            try:
                chunk = made.text.chunk(token)
            except Exception as raised:
                # The caller's ``cancelled`` raised.
                error = raised
        if error is not None or made.text.is_finished:
            self._open.pop(ticket, None)
            if not is_last:
                self._scheduler.finish(ticket)
        return BatchUpdate(ticket, None if error is not None else chunk, error)

    def close(self) -> None:
        """Drop what still runs and free the model for others, after the step under way. Again, it does nothing."""
        self._is_closed = True
        if self._stepping == threading.get_ident():
            return
        with self._turn:
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._scheduler.close()
            self._open.clear()
            self._held.close()
            self._held = None

    def _check(self) -> None:
        if self._is_closed:
            raise ClosedError("this batch was closed; make another with Mixtral.batch")


def _holding(engine: Engine) -> Generator[None, None, None]:
    with engine.running():
        yield


def stream_batch(
    begin: Callable[[], Batch], requests: Sequence[Sequence[TextRequest]]
) -> Generator[tuple[int, Chunk], None, None]:
    """Chunks with the number of the request they belong to, as they come; the last of each has its finish reason.

    ``requests`` are groups that continue one prompt each; numbers go through all of them. An error of one ends all.
    """
    with begin() as batch:
        numbers, first = [], 0
        for group in requests:
            numbers.append(range(first, first + len(group)))
            first += len(group)
        # Prompts of about the same length are computed together.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0].request.tokens))
        index_of: dict[int, int] = {}
        for index in order:
            index_of.update(zip(batch.add_requests(requests[index]), numbers[index], strict=True))
        while not batch.is_idle:
            for ticket, chunk, error in batch.step():
                if error is not None:
                    raise error
                assert chunk is not None
                yield index_of[ticket], chunk


def collect_batch(chunks: Iterator[tuple[int, Chunk]], requests: Sequence[TextRequest]) -> list[Generation]:
    """All of them run to their end."""
    rows: list[list[Chunk]] = [[] for _ in requests]
    for index, chunk in chunks:
        rows[index].append(chunk)
    return [Generation.of(row, made.request.stats) for row, made in zip(rows, requests, strict=True)]
