"""What the chat endpoint asks of a format of tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.tokenizer.base import Message

__all__ = ["AnswerDelta", "AnswerReader", "CallDelta", "CallFormat", "NoCalls", "PlainAnswer", "Prepared", "ToolUse"]


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools, checked.

    Args:
        tools: functions in OpenAI's form.
        choice: "auto", "none", "required", or the name of a function as ``("function", name)``.
        is_parallel: whether an answer may hold several calls.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    choice: str | tuple[str, str] = "auto"
    is_parallel: bool = True


@dataclass(frozen=True)
class CallDelta:
    """More of call ``index`` of an answer: its id and name with the first, then its arguments as they are certain."""

    index: int
    arguments: str = ""
    call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class AnswerDelta:
    """What a chunk adds to an answer; ``finish_reason`` ("stop", "length", "tool_calls") with the last."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: str | None = None


class AnswerReader(Protocol):
    """Tells calls from text in one answer. All deltas together are the same however the text comes in chunks."""

    def add(self, chunk: Chunk) -> AnswerDelta:
        """Take the next chunk of the answer."""


@dataclass(frozen=True)
class Prepared:
    """A conversation as the chat format can write it.

    Args:
        messages: with calls, results and, where the format has no place of its own for them, tools written into them.
        tools: for ``Tokenizer.encode_chat``; None where they are in the messages.
        constraint: what the answer must be so that it holds the calls it has to; None for anything.
        stop: further texts that end an answer.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    constraint: Any = None
    stop: Sequence[str] = ()


class CallFormat(Protocol):
    """One way of calling tools."""

    def prepare(self, messages: Sequence[Message], use: ToolUse) -> Prepared:
        """Write tools, calls and results for the model.

        Raises:
            ApiError: 400: a tool, or a message, that cannot be written.
        """

    def reader(self, use: ToolUse) -> AnswerReader:
        """For one answer."""


class PlainAnswer:
    """An answer that is text and nothing else."""

    def add(self, chunk: Chunk) -> AnswerDelta:
        return AnswerDelta(chunk.text, (), chunk.finish_reason)


class NoCalls:
    """The format of a server that offers no tools."""

    def prepare(self, messages: Sequence[Message], use: ToolUse) -> Prepared:
        if use.tools and use.choice != "none":
            raise ApiError(400, "tools are not supported here; leave them out", "tools", code="unsupported_parameter")
        return Prepared(messages)

    def reader(self, use: ToolUse) -> AnswerReader:
        return PlainAnswer()
