"""Text as it is generated: tokens decoded piece by piece, stop strings honoured, the iterator closed to cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd, CallEvent, CallParser, Event, TextDelta
from mlx_mixtral.calls.turns import ToolCall
from mlx_mixtral.errors import BusyError
from mlx_mixtral.generation.stats import GenerationStats, Token
from mlx_mixtral.runtime.marked_stops import MarkedStops
from mlx_mixtral.runtime.steps import Steps
from mlx_mixtral.tokenizer import StreamingDecoder

__all__ = ["Chunk", "FinishReason", "Generation", "TextAssembler", "TextStream"]

SHOWN_CHARACTERS = 60

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Chunk:
    """One step of a stream: the token, and the text that became certain with it (often empty, never half a character).

    ``logprob`` and ``top_logprobs`` (pairs of token id and log-probability) are there when ``SamplingParams.logprobs`` asks
    for them. ``finish_reason`` is set on the last chunk only, and so is ``stop_string``, that of ``stop`` which ended it.
    ``call_events`` says what became certain of calls of tools: their names, pieces of their arguments, their ends; their markup
    is no text.

    Example:
        >>> [chunk.text for chunk in model.stream("Mixtral is", max_tokens=3)]
    """

    text: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    call_events: tuple[CallEvent, ...] = ()
    stop_string: str | None = None


@dataclass(frozen=True, repr=False)
class Generation:
    """A finished generation. ``token_ids`` holds every token produced, a stop token included; ``text`` leaves it out.

    ``tool_calls`` are the calls of an answer that was given tools, their arguments whole JSON texts: where "length" ends an
    answer within a call, that call is not among them.

    Example:
        >>> out = model.generate("Mixtral is", max_tokens=64)
        >>> out.text, out.finish_reason, out.stats.decode_tok_s
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: tuple[float, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN_CHARACTERS else f"{self.text[:SHOWN_CHARACTERS]}…"
        return f"<Generation: {text!r}; {len(self.token_ids)} tokens, {self.finish_reason}>"

    @classmethod
    def of(cls, chunks: Sequence[Chunk], stats: GenerationStats) -> Self:
        """All chunks of a stream put together."""
        logprobs = tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None)
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token_id for chunk in chunks),
            # A stream that was closed by another thread has no last chunk.
            finish_reason=(chunks[-1].finish_reason if chunks else None) or "cancelled",
            stats=stats,
            logprobs=logprobs if len(logprobs) == len(chunks) else None,
            tool_calls=_whole_calls([event for chunk in chunks for event in chunk.call_events]),
        )


def _whole_calls(events: Sequence[CallEvent]) -> tuple[ToolCall, ...]:
    begun = {event.index: event for event in events if isinstance(event, CallBegin)}
    arguments = dict.fromkeys(begun, "")
    for event in events:
        if isinstance(event, ArgumentsDelta):
            arguments[event.index] += event.text
    ended = [begun[event.index] for event in events if isinstance(event, CallEnd)]
    return tuple(ToolCall(begin.id, begin.name, arguments[begin.index]) for begin in ended)


class TextStream(Iterator[Chunk]):
    """Iterate to generate; ``close()`` (or leaving a ``with`` block, or dropping it) cancels. ``stats`` is kept up to date.

    The model is busy from the first step until the stream ends or is closed. Steps may be taken from different threads, one
    at a time.

    Example:
        >>> with model.stream("Once upon a time") as stream:
        ...     for chunk in stream:
        ...         print(chunk.text, end="")
    """

    def __init__(self, tokens: Steps[Token], text: TextAssembler, stats: GenerationStats) -> None:
        self.stats = stats
        # Neither of them knows this object: no cycle, so dropping the stream closes the generator at once.
        self._tokens, self._text = tokens, text
        self._reading = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if not self._reading.acquire(blocking=False):
            raise BusyError("this stream is already being read on another thread; read it on one at a time")
        try:
            if self._text.is_finished:
                self._tokens.close()
                raise StopIteration
            token = next(self._tokens)
            try:
                return self._text.chunk(token)
            except BaseException:
                # The caller's ``cancelled`` may raise; a stream that is still held must not hold the model.
                self._tokens.close()
                raise
        finally:
            self._reading.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating and free the model for others; on another thread than the one that reads, after the step under way.

        Does nothing the second time.
        """
        self._tokens.close()

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
        parser: finds calls of tools in the text; None: there are none.
    """

    def __init__(
        self,
        decoder: StreamingDecoder | None,
        max_tokens: int,
        stop_ids: frozenset[int],
        stops: MarkedStops,
        cancelled: Callable[[], bool] | None,
        parser: CallParser | None = None,
    ) -> None:
        self._decoder, self._max_tokens, self._stop_ids = decoder, max_tokens, stop_ids
        self._stops, self._cancelled = stops, cancelled
        self._parser = parser
        self._barriers = frozenset[int]() if parser is None else parser.barriers
        self._tokens = 0
        self.is_finished = False
        """Whether the last chunk was made."""

    def chunk(self, token: Token) -> Chunk:
        """What there is to show with a token; the last chunk has the reason."""
        self._tokens += 1
        text, reason = self._add(token.token_id, token.end)
        self.is_finished = reason is not None
        events: list[Event] = []
        if self._parser is not None:
            events = self._parser.add(text, token.token_id)
            if reason is not None:
                events += self._parser.finish(was_cut=reason != "stop")
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
        calls = tuple(event for event in events if not isinstance(event, TextDelta))
        stop = self._stops.matched
        return Chunk(text, token.token_id, token.logprob, token.top_logprobs, reason, calls, stop)

    def _add(self, token_id: int, end: FinishReason | None) -> tuple[str, FinishReason | None]:
        is_stop_token = token_id in self._stop_ids
        text = "" if is_stop_token or self._decoder is None else self._stops.add(self._decoder.add(token_id), token_id)
        if token_id in self._barriers and self._decoder is not None and not self._stops.is_stopped():
            text += self._stops.add(self._decoder.finish()) + self._stops.finish()
        if self._stops.is_stopped():
            return text, "stop"
        reason: FinishReason | None = end or ("stop" if is_stop_token else None)
        if reason is None and self._tokens == self._max_tokens:
            reason = "length"
        elif reason is None and self._cancelled is not None and self._cancelled():
            reason = "cancelled"
        if reason is not None and self._decoder is not None:
            text += self._stops.add(self._decoder.finish())
            if self._stops.is_stopped():
                return text, "stop"
            text += self._stops.finish()
        return text, reason
