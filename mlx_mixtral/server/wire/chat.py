"""/v1/chat/completions: its body, its replies and chunks (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.calls.base import AnswerReader, CallDelta
from mlx_mixtral.server.jobs import NewToken
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, Integer, ListOf, Text
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs, LogprobEntry, chat_logprobs
from mlx_mixtral.server.wire.sampling import COMMON_FIELDS, MAX_TOP_LOGPROBS, SAMPLING_FIELDS, STREAM_FIELDS
from mlx_mixtral.server.wire.structure import STRUCTURE_FIELDS

__all__ = ["CHAT_BODY", "ChatReply"]

MAX_MESSAGES = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool")

CONTENT_PART = BodyTable((
    BodyField("type", Choice(("text", "refusal")), "What it is.", required=True),
    BodyField("text", Text(), "The text."),
    BodyField("refusal", Text(), "The text of a refusal."),
), "ContentPart")  # fmt: skip

TOOL_CALL = BodyTable((
    BodyField("id", Text(), "Tells calls of a turn apart.", ""),
    BodyField("type", Choice(("function",)), "What is called.", "function"),
    BodyField("function", BodyTable((
        BodyField("name", Text(1), "Its name.", required=True),
        BodyField("arguments", Either((Text(), Anything(is_object=True))), "Its arguments, as JSON text.", "{}"),
    )), "The function.", required=True),
), "ToolCall")  # fmt: skip

MESSAGE = BodyTable((
    BodyField("role", Choice(ROLES), "Who speaks.", required=True),
    BodyField("content", Either((Text(), ListOf(CONTENT_PART))), "The text, or a list of texts."),
    BodyField("name", Text(), "Of a tool, whose result it is."),
    BodyField("tool_calls", ListOf(TOOL_CALL), "Calls of the assistant's."),
    BodyField("tool_call_id", Text(), "Of a tool: the call it answers."),
    BodyField("refusal", Text(), "Of the assistant: text in place of content."),
), "ChatMessage")  # fmt: skip

TOOL = BodyTable((
    BodyField("type", Choice(("function",)), "What it is.", required=True),
    BodyField("function", BodyTable((
        BodyField("name", Text(1, 64), "Its name.", required=True),
        BodyField("description", Text(), "What it does.", ""),
        BodyField("parameters", Anything(is_object=True), "A JSON schema of its arguments.", {}),
        BodyField("strict", Flag(), "Refuse schemas that cannot be kept to the letter.", False),
    )), "The function.", required=True),
), "Tool")  # fmt: skip

TOOL_CHOICE = Either((
    Choice(("none", "auto", "required", "any")),
    BodyTable((
        BodyField("type", Choice(("function", "auto", "none", "required", "any", "tool")), "What is chosen.", required=True),
        BodyField("function", BodyTable((BodyField("name", Text(1), "The function's name.", required=True),)), "The function."),
        BodyField("name", Text(1), "The same, as some clients write it."),
    )),
))  # fmt: skip

CHAT_BODY = BodyTable((
    BodyField("messages", ListOf(MESSAGE, 1, MAX_MESSAGES), "The conversation; its answer is generated.", required=True),
    *COMMON_FIELDS,
    BodyField("max_completion_tokens", Integer(1), "Most tokens of an answer; the context ends it earlier when it is full."),
    BodyField("max_tokens", Integer(1), "The older name of max_completion_tokens."),
    *SAMPLING_FIELDS,
    BodyField("logprobs", Flag(), "Log-probabilities of the answer's tokens.", False),
    BodyField("top_logprobs", Integer(0, MAX_TOP_LOGPROBS), "And of the likeliest tokens in place of each; needs logprobs."),
    *STREAM_FIELDS,
    BodyField("tools", ListOf(TOOL, most=128), "Functions the model may call.", []),
    BodyField("tool_choice", TOOL_CHOICE, "Whether it calls one: none, auto, required, or which."),
    BodyField("parallel_tool_calls", Flag(), "Whether an answer may hold several calls.", True),
    *STRUCTURE_FIELDS,
    BodyField("functions", None, "The older form of tools.", off=([],), instead="use tools"),
    BodyField("function_call", None, "The older form of tool_choice.", off=("none", "auto"), instead="use tool_choice"),
    BodyField("modalities", None, "Other output than text.", off=(["text"],)),
    BodyField("audio", None, "Spoken output."),
    BodyField("prediction", None, "A predicted answer."),
    BodyField("web_search_options", None, "Searching the web.", off=({},)),
), "ChatCompletionRequest")  # fmt: skip


@dataclass
class _Answer:
    """One answer so far."""

    reader: AnswerReader
    logprobs: AnswerLogprobs | None
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None
    is_told: bool = False

    def add(self, chunk: Chunk) -> tuple[list[dict[str, Any]], list[LogprobEntry]]:
        """Deltas, the last without the reason, and log-probabilities that are certain now."""
        delta = self.reader.add(chunk)
        ready = [] if self.logprobs is None else self.logprobs.add(chunk)
        self.entries += ready
        deltas: list[dict[str, Any]] = []
        if not self.is_told:
            self.is_told = True
            deltas.append({"role": "assistant", "content": ""})
        if delta.content:
            self.content.append(delta.content)
            deltas.append({"content": delta.content})
        for call in delta.calls:
            self._note(call)
            deltas.append({"tool_calls": [_call_delta(call)]})
        self.finish_reason = delta.finish_reason
        return deltas, ready

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message |= {"content": content or None, "tool_calls": self.calls}
        return message

    def _note(self, call: CallDelta) -> None:
        if call.index == len(self.calls):
            function = {"name": call.name or "", "arguments": ""}
            self.calls.append({"id": call.call_id or "", "type": "function", "function": function})
        self.calls[call.index]["function"]["arguments"] += call.arguments


class ChatReply:
    """Builds the reply to one request, whole or in chunks; both are the same deltas.

    Args:
        head: ``id``, ``created``, ``model`` and ``system_fingerprint``.
        readers: one an answer.
        logprobs: one an answer, None where they are not wanted.
        has_usage: whether chunks say what was used.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        readers: Sequence[AnswerReader],
        logprobs: Sequence[AnswerLogprobs | None],
        *,
        has_usage: bool,
        warnings: Sequence[str] = (),
    ) -> None:
        self._head, self._has_usage, self._warnings = dict(head), has_usage, list(warnings)
        self._answers = [_Answer(*parts) for parts in zip(readers, logprobs, strict=True)]

    def add(self, event: NewToken) -> list[dict[str, Any]]:
        """Take a token; the chunks to send with it."""
        answer = self._answers[event.row]
        deltas, entries = answer.add(event.chunk)
        if entries and not any(delta.get("content") or "tool_calls" in delta for delta in deltas):
            deltas.append({"content": ""})
        chunks = [self._chunk([self._choice(event.row, delta)]) for delta in deltas]
        if entries:
            chunks[-1]["choices"][0]["logprobs"] = {"content": chat_logprobs(entries), "refusal": None}
        if answer.finish_reason is not None:
            chunks.append(self._chunk([self._choice(event.row, {}, answer.finish_reason)]))
        return chunks

    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """Chunks to send when all answers are whole."""
        return [self._chunk([], usage)] if self._has_usage else []

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The reply without chunks."""
        choices = [
            {
                "index": index,
                "message": answer.message(),
                "logprobs": None
                if answer.logprobs is None
                else {"content": chat_logprobs(answer.entries), "refusal": None},
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(self._answers)
        ]
        extra = {"warnings": self._warnings} if self._warnings else {}
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage} | extra

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": usage} if self._has_usage else chunk


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.call_id, "type": "function", "function": {"name": call.name} | function}
