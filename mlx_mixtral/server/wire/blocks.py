"""An answer as blocks one after the other, each of them text or a call, as Anthropic's protocol and Responses have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd, CallEvent
from mlx_mixtral.runtime.stream import Chunk

__all__ = ["Block", "BlockReader", "BlockStep", "Change"]


class Change(Enum):
    """What happened to a block."""

    BEGAN = auto()
    GREW = auto()
    ENDED = auto()


@dataclass(eq=False)
class Block:
    """Text, or a call.

    Attributes:
        index: in the answer, from 0.
        call: its id and name; None for text.
        pieces: of the text, or of a call's arguments.
        is_whole: a call that was cut, or turned out to be none, never becomes whole.
    """

    index: int
    call: CallBegin | None = None
    pieces: list[str] = field(default_factory=list)
    is_whole: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class BlockStep:
    """A change of a block; ``text`` is what it grew by."""

    block: Block
    change: Change
    text: str = ""


class BlockReader:
    """Reads one answer, as steps and as whole blocks; an answer that says nothing is one block of no text.

    Attributes:
        blocks: all that began.
        finish_reason: "stop" or "length"; None while the answer goes on.
        stop_string: the one that ended it.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_string: str | None = None
        self._open: Block | None = None

    @property
    def whole_blocks(self) -> list[Block]:
        """Text, and calls that are whole; of a finished answer at least one."""
        whole = [block for block in self.blocks if block.is_whole]
        return whole or [Block(0, is_whole=True)] * (self.finish_reason is not None)

    @property
    def has_calls(self) -> bool:
        """Whether there is a whole call."""
        return any(block.call is not None for block in self.whole_blocks)

    def add(self, chunk: Chunk) -> list[BlockStep]:
        """Take the next chunk; what changed, in order."""
        steps = [step for part in self._parts(chunk) for step in self._take(part)]
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_string = chunk.finish_reason, chunk.stop_string
            if not self.blocks:
                steps += self._begin(None)
            steps += self._end()
        return steps

    def _parts(self, chunk: Chunk) -> Iterator[str | CallEvent]:
        """What a chunk holds: its text stands behind a call that ends with it, and before the calls that begin."""
        events = list(chunk.call_events)
        if self._open is not None and self._open.call is not None and chunk.text:
            while events and not isinstance(events[0], CallBegin):
                yield events.pop(0)
        if chunk.text:
            yield chunk.text
        yield from events

    def _take(self, part: str | CallEvent) -> Iterator[BlockStep]:
        if isinstance(part, CallBegin):
            yield from self._end()
            yield from self._begin(part)
        elif isinstance(part, CallEnd):
            yield from self._end(is_whole=True)
        elif isinstance(part, ArgumentsDelta):
            yield from self._grow(part.text)
        else:
            if self._open is None or self._open.call is not None:
                yield from self._end()
                yield from self._begin(None)
            yield from self._grow(part)

    def _begin(self, call: CallBegin | None) -> Iterator[BlockStep]:
        self._open = Block(len(self.blocks), call)
        self.blocks.append(self._open)
        yield BlockStep(self._open, Change.BEGAN)

    def _grow(self, text: str) -> Iterator[BlockStep]:
        if self._open is not None and text:
            self._open.pieces.append(text)
            yield BlockStep(self._open, Change.GREW, text)

    def _end(self, *, is_whole: bool = False) -> Iterator[BlockStep]:
        block, self._open = self._open, None
        if block is not None:
            block.is_whole = is_whole or block.call is None
            yield BlockStep(block, Change.ENDED)
