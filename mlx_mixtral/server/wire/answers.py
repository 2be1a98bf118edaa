"""An assistant's answer as it comes: text, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd, CallEvent
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
        is_legacy: calls are told as ``function_call``, to a client that asked with ``functions``.
    """

    def __init__(self, *, is_legacy: bool = False) -> None:
        self._is_legacy = is_legacy
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._whole = 0
        self.finish_reason: str | None = None
        """OpenAI's word; None while the answer goes on."""

    def add(self, chunk: Chunk) -> AnswerPart:
        """Take the next chunk."""
        deltas = [{"content": chunk.text}] if chunk.text else []
        self._text.append(chunk.text)
        deltas += [delta for event in chunk.call_events for delta in self._deltas(event)]
        if chunk.finish_reason is not None:
            called = "function_call" if self._is_legacy else "tool_calls"
            self.finish_reason = called if self._whole and chunk.finish_reason == "stop" else chunk.finish_reason
        return AnswerPart(deltas, self.finish_reason)

    def message(self) -> dict[str, Any]:
        """The whole answer: calls that are whole, and the text beside them."""
        text, calls = "".join(self._text), self._calls[: self._whole]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if not calls:
            return message
        if self._is_legacy:
            return message | {"content": text or None, "function_call": calls[0]["function"]}
        return message | {"content": text or None, "tool_calls": calls}

    def _deltas(self, event: CallEvent) -> list[dict[str, Any]]:
        if isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            self._calls.append({"id": event.id, "type": "function", "function": dict(function)})
            if self._is_legacy:
                return [{"function_call": function}]
            return [{"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}]
        if isinstance(event, ArgumentsDelta):
            self._calls[event.index]["function"]["arguments"] += event.text
            if self._is_legacy:
                return [{"function_call": {"arguments": event.text}}]
            return [{"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}]
        if isinstance(event, CallEnd):
            self._whole += 1
        return []
