"""Text as it is generated: tokens decoded piece by piece, stop strings honoured, the iterator closed to cancel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import mlx.core as mx

from mlx_mixtral.errors import BusyError
from mlx_mixtral.generation.stats import GenerationStats, Token
from mlx_mixtral.generation.stop import StopStrings
from mlx_mixtral.machine.device import Device, wired
from mlx_mixtral.tokenizer import StreamingDecoder

__all__ = ["Chunk", "FinishReason", "Generation", "TextAssembler", "TextStream"]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Chunk:
    """One step of a stream: the token, and the text that became certain with it (often empty, never half a character).

    ``logprob`` and ``top_logprobs`` (pairs of token id and log-probability) are there when ``SamplingParams.logprobs`` asks
    for them. ``finish_reason`` is set on the last chunk only.
    """

    text: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation. ``token_ids`` holds every token produced, a stop token included; ``text`` leaves it out."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: tuple[float, ...] | None = None

    @classmethod
    def of(cls, chunks: Sequence[Chunk], stats: GenerationStats) -> Self:
        """All chunks of a stream put together."""
        logprobs = tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None)
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token_id for chunk in chunks),
            finish_reason=chunks[-1].finish_reason or "length",
            stats=stats,
            logprobs=logprobs if len(logprobs) == len(chunks) else None,
        )


class TextStream(Iterator[Chunk]):
    """Iterate to generate; ``close()`` (or leaving a ``with`` block, or dropping it) cancels. ``stats`` is kept up to date.

    The model is busy from the first step until the stream ends or is closed. Steps may be taken from different threads, one
    at a time.
    """

    def __init__(
        self,
        tokens: Callable[[GenerationStats], Generator[Token, None, None]],
        text: TextAssembler,
        guard: contextlib.AbstractContextManager[None],
        device: Device,
        stream: mx.Stream,
        budget_bytes: int | None = None,
    ) -> None:
        self.stats = GenerationStats()
        # The generator does not know this object: no cycle, so dropping the stream closes it at once.
        self._steps = _run(tokens, text, guard, wired(device, stream, budget_bytes), self.stats, stream)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            return next(self._steps)
        except ValueError as error:
            if "already executing" in str(error):
                raise BusyError(
                    "this stream is already being read on another thread; read it on one at a time"
                ) from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating and free the model for others. Does nothing the second time."""
        self._steps.close()

    def collect(self) -> Generation:
        """Run to the end."""
        with self:
            chunks = list(self)
        return Generation.of(chunks, self.stats)


class TextAssembler:
    """Turns tokens into text and decides when a generation ends.

    Args:
        decoder: the tokenizer's streaming decoder, None for token ids only.
        max_tokens: tokens after which the reason is "length".
        stop_ids: tokens that end it and have no text.
        stops: text that ends it.
        cancelled: asked after every token.
    """

    def __init__(
        self,
        decoder: StreamingDecoder | None,
        max_tokens: int,
        stop_ids: frozenset[int],
        stops: StopStrings,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._decoder, self._max_tokens, self._stop_ids = decoder, max_tokens, stop_ids
        self._stops, self._cancelled = stops, cancelled

    def add(self, token_id: int, count: int) -> tuple[str, FinishReason | None]:
        """Text to show for the ``count``-th token, and why generation ends with it, if it does."""
        is_stop_token = token_id in self._stop_ids
        text = "" if is_stop_token or self._decoder is None else self._stops.add(self._decoder.add(token_id))
        if self._stops.is_stopped():
            return text, "stop"
        reason: FinishReason | None = None
        if is_stop_token:
            reason = "stop"
        elif count == self._max_tokens:
            reason = "length"
        elif self._cancelled is not None and self._cancelled():
            reason = "cancelled"
        if reason is not None and self._decoder is not None:
            text += self._stops.add(self._decoder.finish())
            if self._stops.is_stopped():
                return text, "stop"
            text += self._stops.finish()
        return text, reason


def _run(
    tokens: Callable[[GenerationStats], Generator[Token, None, None]],
    text: TextAssembler,
    guard: contextlib.AbstractContextManager[None],
    memory: contextlib.AbstractContextManager[None],
    stats: GenerationStats,
    stream: mx.Stream,
) -> Generator[Chunk, None, None]:
    with guard, memory:
        mx.reset_peak_memory()
        try:
            with contextlib.closing(tokens(stats)) as steps:
                for count, token in enumerate(steps, start=1):
                    stats.peak_memory_bytes = mx.get_peak_memory()
                    shown, reason = text.add(token.token_id, count)
                    yield Chunk(shown, token.token_id, token.logprob, token.top_logprobs, reason)
                    if reason is not None:
                        return
        finally:
            # The step scheduled ahead may still run: a program that ends now would take MLX's threads down under it.
            mx.synchronize(stream)
