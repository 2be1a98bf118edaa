"""Replies and events of /v1/messages (https://platform.claude.com/docs/en/build-with-claude/streaming)."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from mlx_mixtral.server.jobs import NewToken, ReplyPart
from mlx_mixtral.server.wire.blocks import Block, BlockReader, BlockStep, Change
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.reply import NamedReply
from mlx_mixtral.server.wire.sse import data_event

__all__ = ["MessagesReply"]


class MessagesReply(NamedReply):
    """Builds the reply to one request, whole or as events.

    Args:
        reply_id: its id.
        model: its name.
        prompt_tokens: of the conversation.
        stop_sequences: those of the request.
        is_limited_by_context: whether the context is full before ``max_tokens`` of the request are there.
        warnings: what of a schema cannot be kept.
    """

    waiting = data_event({"type": "ping"}, "ping")

    def __init__(
        self,
        reply_id: str,
        model: str,
        *,
        prompt_tokens: int,
        stop_sequences: Collection[str] = (),
        is_limited_by_context: bool = False,
        warnings: Sequence[str] = (),
    ) -> None:
        self._id, self._model, self._prompt_tokens = reply_id, model, prompt_tokens
        self._stop_sequences, self._is_limited_by_context = stop_sequences, is_limited_by_context
        self._extra = {"warnings": list(warnings)} if warnings else {}
        self._reader = BlockReader()

    def first(self) -> list[dict[str, Any]]:
        usage = _usage(self._prompt_tokens, 0, 0)
        return [{"type": "message_start", "message": self._message([], None, None, usage)}]

    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        steps = self._reader.add(event.chunk) if isinstance(event, NewToken) else []
        return [_event(step) for step in steps]

    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        reason, sequence = self._ended_by()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            {"type": "message_delta", "delta": delta, "usage": _usage_of(usage)} | self._extra,
            {"type": "message_stop"},
        ]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        return [error.anthropic_body]

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        content = [_content(block) for block in self._reader.whole_blocks]
        return self._message(content, *self._ended_by(), _usage_of(usage)) | self._extra

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _ended_by(self) -> tuple[str, str | None]:
        """The reason in Anthropic's words, and the stop sequence where it is one."""
        reader = self._reader
        if reader.finish_reason != "stop":
            return ("model_context_window_exceeded" if self._is_limited_by_context else "max_tokens"), None
        if reader.has_calls:
            return "tool_use", None
        if reader.stop_string in self._stop_sequences:
            return "stop_sequence", reader.stop_string
        return "end_turn", None


def _event(step: BlockStep) -> dict[str, Any]:
    block = step.block
    if step.change is Change.BEGAN:
        return {
            "type": "content_block_start",
            "index": block.index,
            "content_block": _content(Block(block.index, block.call)),
        }
    if step.change is Change.ENDED:
        return {"type": "content_block_stop", "index": block.index}
    if block.call is None:
        delta = {"type": "text_delta", "text": step.text}
    else:
        delta = {"type": "input_json_delta", "partial_json": step.text}
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _content(block: Block) -> dict[str, Any]:
    if block.call is None:
        return {"type": "text", "text": block.text}
    arguments = _object(block.text) if block.is_whole else {}
    return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": arguments}


def _object(text: str) -> dict[str, Any]:
    """Arguments of a call; a model that nothing held to them may have written other text, which is told as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _usage_of(usage: dict[str, Any]) -> dict[str, int]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return _usage(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    """Anthropic's ``input_tokens`` are those that no cache had."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }
