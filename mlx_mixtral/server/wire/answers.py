"""An assistant's answer as it comes: text, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallParser, Event, TextDelta
from mlx_mixtral.runtime.stream import Chunk

__all__ = ["AnswerPart", "AnswerReader"]


@dataclass(frozen=True)
class AnswerPart:
    """What a chunk adds: deltas of a message, and the reason with the last one."""

    deltas: Sequence[dict[str, Any]]
    finish_reason: str | None


class AnswerReader:
    """Reads one answer, as deltas and as the whole message; the same however the text comes in chunks.

    Args:
        parser: tells calls from text.
        is_legacy: calls are told as ``function_call``, to a client that asked with ``functions``.
    """

    def __init__(self, parser: CallParser, *, is_legacy: bool = False) -> None:
        self._parser, self._is_legacy = parser, is_legacy
        self._text: list[str] = []
        self.finish_reason: str | None = None
        """OpenAI's word; None while the answer goes on."""

    def add(self, chunk: Chunk) -> AnswerPart:
        """Take the next chunk."""
        events = self._parser.add(chunk.text, chunk.token_id)
        if chunk.finish_reason is not None:
            events += self._parser.finish(was_cut=chunk.finish_reason != "stop")
            has_calls = bool(self._parser.calls) and chunk.finish_reason == "stop"
            called = "function_call" if self._is_legacy else "tool_calls"
            self.finish_reason = called if has_calls else chunk.finish_reason
        return AnswerPart([delta for event in events for delta in self._deltas(event)], self.finish_reason)

    @property
    def text(self) -> str:
        """Of the answer so far."""
        return "".join(self._text)

    def message(self) -> dict[str, Any]:
        """The whole answer: calls that are whole, and the text beside them."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self._parser.calls:
            message["content"] = self.text or None
            if self._is_legacy:
                message["function_call"] = self._parser.calls[0].message["function"]
            else:
                message["tool_calls"] = [call.message for call in self._parser.calls]
        return message

    def _deltas(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, TextDelta):
            self._text.append(event.text)
            return [{"content": event.text}]
        if isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            if self._is_legacy:
                return [{"function_call": function}]
            return [{"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}]
        if isinstance(event, ArgumentsDelta):
            if self._is_legacy:
                return [{"function_call": {"arguments": event.text}}]
            return [{"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}]
        return []
