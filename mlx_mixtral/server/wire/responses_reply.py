"""Replies and events of /v1/responses (https://platform.openai.com/docs/api-reference/responses-streaming)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_mixtral.server.jobs import NewToken, ReplyPart
from mlx_mixtral.server.wire.blocks import Block, BlockReader, BlockStep, Change
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs, LogprobEntry, chat_logprobs
from mlx_mixtral.server.wire.reply import NamedReply

__all__ = ["ResponsesReply", "response_frame"]


def response_frame(body: Mapping[str, Any], model: str, *, temperature: float, top_p: float) -> dict[str, Any]:
    """What a reply says of its request, from a body that was read."""
    config = body["text"] or {}
    described = config.get("format") or {"type": "text"}
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "background": False,
        "instructions": body["instructions"],
        "max_output_tokens": body["max_output_tokens"],
        "max_tool_calls": body["max_tool_calls"],
        "metadata": body["metadata"],
        "parallel_tool_calls": body["parallel_tool_calls"],
        "previous_response_id": None,
        "store": False,
        "temperature": temperature,
        "text": {"format": {name: value for name, value in described.items() if value is not None}},
        "tool_choice": body["tool_choice"],
        "tools": [{"parameters": None, **tool, "type": "function"} for tool in body["tools"]],
        "top_logprobs": body["top_logprobs"] or 0,
        "top_p": top_p,
        "truncation": "disabled",
        "user": body["user"],
    }


class ResponsesReply(NamedReply):
    """Builds the reply to one request, whole or as events.

    Args:
        frame: see ``response_frame``.
        logprobs: of the answer's text; None where they are not wanted.
        warnings: what of a schema cannot be kept.
    """

    def __init__(self, frame: Mapping[str, Any], logprobs: AnswerLogprobs | None, warnings: Sequence[str] = ()) -> None:
        self._frame = dict(frame) | ({"warnings": list(warnings)} if warnings else {})
        self._logprobs = logprobs
        self._reader = BlockReader()
        self._ids: dict[int, str] = {}
        self._entries: dict[int, list[LogprobEntry]] = {}
        self._unsent: list[LogprobEntry] = []
        self._number = 0

    def first(self) -> list[dict[str, Any]]:
        response = self._response("in_progress")
        return [self._event(f"response.{what}", response=response) for what in ("created", "in_progress")]

    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        if not isinstance(event, NewToken):
            return []
        if self._logprobs is not None:
            self._unsent += self._logprobs.add(event.chunk)
        return [made for step in self._reader.add(event.chunk) for made in self._events(step)]

    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        response = self.whole(usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.status, "server_error")
        response = self._response("failed", error={"code": code, "message": error.message})
        return [self._event("response.failed", response=response)]

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        is_cut = self._reader.finish_reason == "length"
        output = [self._item(block, self._status(block)) for block in self._reader.whole_blocks]
        return self._response(
            "incomplete" if is_cut else "completed",
            output=output,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            usage=_usage_of(usage),
        )

    def _response(self, status: str, **parts: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "output": [],
            "usage": None,
        }
        return self._frame | {"status": status} | usual | parts

    def _events(self, step: BlockStep) -> Iterator[dict[str, Any]]:
        block = step.block
        place = {"item_id": self._id(block), "output_index": block.index}
        if step.change is Change.BEGAN:
            item = self._item(Block(block.index, block.call), "in_progress", has_content=False)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.call is None:
            yield from self._text_events(step, place | {"content_index": 0})
        elif step.change is Change.GREW:
            yield self._event("response.function_call_arguments.delta", **place, delta=step.text)
        elif step.change is Change.ENDED and block.is_whole:
            said = {"name": block.call.name, "arguments": block.text}
            yield self._event("response.function_call_arguments.done", **place, **said)
        if step.change is Change.ENDED:
            item = self._item(block, self._status(block))
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _text_events(self, step: BlockStep, place: dict[str, Any]) -> Iterator[dict[str, Any]]:
        block = step.block
        if step.change is Change.BEGAN:
            yield self._event("response.content_part.added", **place, part=_part("", []))
            return
        entries, self._unsent = self._unsent, []
        self._entries.setdefault(block.index, []).extend(entries)
        if step.change is Change.GREW or entries:
            delta = {"delta": step.text, "logprobs": _logprobs(entries)}
            yield self._event("response.output_text.delta", **place, **delta)
        if step.change is Change.ENDED:
            logprobs = _logprobs(self._entries[block.index])
            yield self._event("response.output_text.done", **place, text=block.text, logprobs=logprobs)
            yield self._event("response.content_part.done", **place, part=_part(block.text, logprobs))

    def _item(self, block: Block, status: str, *, has_content: bool = True) -> dict[str, Any]:
        if block.call is None:
            logprobs = _logprobs(self._entries.get(block.index, []))
            content = [_part(block.text, logprobs)] if has_content else []
            return {
                "id": self._id(block),
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": content,
            }
        return {
            "id": self._id(block),
            "type": "function_call",
            "call_id": block.call.id,
            "name": block.call.name,
            "arguments": block.text,
            "status": status,
        }

    def _status(self, block: Block) -> str:
        """Of a block that ended: text at the end of an answer that was cut is not whole, and a call may have been cut."""
        is_last = block.call is None and block.index == len(self._reader.blocks) - 1
        is_cut = self._reader.finish_reason == "length" and is_last
        return "incomplete" if is_cut or not block.is_whole else "completed"

    def _id(self, block: Block) -> str:
        kind = "msg" if block.call is None else "fc"
        return self._ids.setdefault(block.index, f"{kind}_{secrets.token_hex(16)}")

    def _event(self, kind: str, **parts: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | parts


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprobs(entries: Sequence[LogprobEntry]) -> list[dict[str, Any]]:
    """As in chat completions; control tokens have no bytes, which is an empty list here."""
    made = chat_logprobs(entries)
    for entry in [each for one in made for each in (one, *one["top_logprobs"])]:
        entry["bytes"] = entry["bytes"] or []
    return made


def _usage_of(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
