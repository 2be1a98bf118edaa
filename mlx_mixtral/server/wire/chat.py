"""/v1/chat/completions: its body, its replies and chunks (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mixtral.server.jobs import NewToken, ReplyPart
from mlx_mixtral.server.wire.answers import AnswerReader
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, Integer, ListOf, String
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs, LogprobEntry, chat_logprobs
from mlx_mixtral.server.wire.reply import StreamedReply, UsageSoFar
from mlx_mixtral.server.wire.sampling import COMMON_FIELDS, MAX_TOP_LOGPROBS, SAMPLING_FIELDS, STREAM_FIELDS
from mlx_mixtral.server.wire.structure import STRUCTURE_FIELDS
from mlx_mixtral.server.wire.unsupported import NOT_IN_CHATS, NOT_IN_GENERATING

__all__ = ["CHAT_BODY", "CONTINUATION_FIELDS", "ChatReply", "check_continuation"]

MAX_MESSAGES = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_FUNCTION_FIELDS = (
    BodyField("name", String(1, 64), "Its name.", required=True),
    BodyField("description", String(), "What it does."),
    BodyField("parameters", Anything(is_object=True), "A JSON schema of its arguments."),
    BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter."),
)

CONTENT_PART = BodyTable((
    BodyField("type", Choice(("text", "input_text", "output_text", "refusal")), "What it is.", "text"),
    BodyField("text", String(), "The text."),
    BodyField("refusal", String(), "The text of a refusal."),
), "ContentPart")  # fmt: skip

CALLED_FUNCTION = BodyTable((
    BodyField("name", String(1), "Its name.", required=True),
    BodyField("arguments", Either((String(), Anything(is_object=True))), "Its arguments, as JSON text."),
))  # fmt: skip

TOOL_CALL = BodyTable((
    BodyField("id", String(), "Tells calls apart."),
    BodyField("type", Choice(("function",)), "What is called."),
    BodyField("function", CALLED_FUNCTION, "The function.", required=True),
), "ToolCall")  # fmt: skip

MESSAGE = BodyTable((
    BodyField("role", Choice(ROLES), "Who speaks.", required=True),
    BodyField("content", Either((String(), ListOf(Either((String(), CONTENT_PART))))), "Text, or a list of texts."),
    BodyField("name", String(), "Of a tool, whose result it is."),
    BodyField("tool_calls", ListOf(TOOL_CALL), "Calls of the assistant's."),
    BodyField("function_call", CALLED_FUNCTION, "The older form of tool_calls."),
    BodyField("tool_call_id", String(), "Of a tool: the call it answers."),
), "ChatMessage")  # fmt: skip

TOOL = BodyTable((
    BodyField("type", Choice(("function",)), "What it is."),
    BodyField("function", BodyTable(_FUNCTION_FIELDS), "The function.", required=True),
), "Tool")  # fmt: skip

_CHOSEN_FUNCTION = BodyTable((BodyField("name", String(1), "The function's name.", required=True),))

CONTINUATION_FIELDS = (
    BodyField(
        "add_generation_prompt", Flag(), "Whether an answer begins; it does not where the assistant's message is last."
    ),
    BodyField(
        "continue_final_message", Flag(), "Whether the last message goes on; it does where it is the assistant's."
    ),
)
"""vLLM's. Here the last message decides, and a body that says otherwise is refused."""

_CHOICE_KINDS = ("function", "allowed_tools", "auto", "none", "required", "any", "tool")

TOOL_CHOICE = Either((
    Choice(("none", "auto", "required", "any")),
    BodyTable((
        BodyField("type", Choice(_CHOICE_KINDS), "What is chosen.", required=True),
        BodyField("function", _CHOSEN_FUNCTION, "The function."),
        BodyField("name", String(1), "The same, as some clients write it."),
        BodyField("allowed_tools", BodyTable((
            BodyField("mode", Choice(("auto", "required")), "Whether one must be called.", required=True),
            BodyField("tools", ListOf(Anything(is_object=True)), "Which.", required=True),
        )), "Some of the tools."),
    )),
))  # fmt: skip

CHAT_BODY = BodyTable((
    BodyField("messages", ListOf(MESSAGE, 1, MAX_MESSAGES), "The conversation; its answer is generated.", required=True),
    *COMMON_FIELDS,
    BodyField("max_completion_tokens", Integer(1), "Most tokens of an answer (--max-tokens of the server)."),
    BodyField("max_tokens", Integer(1), "The older name of max_completion_tokens."),
    *SAMPLING_FIELDS,
    BodyField("logprobs", Flag(), "Log-probabilities of the answer's tokens.", False),
    BodyField("top_logprobs", Integer(0, MAX_TOP_LOGPROBS), "And of the likeliest tokens in place of each; needs logprobs."),
    *STREAM_FIELDS,
    BodyField("tools", ListOf(TOOL, most=128), "Functions the model may call."),
    BodyField("tool_choice", TOOL_CHOICE, "Whether it calls one: none, auto, required, or which."),
    BodyField("parallel_tool_calls", Flag(), "Whether an answer may hold several calls."),
    *STRUCTURE_FIELDS,
    BodyField("functions", ListOf(BodyTable(_FUNCTION_FIELDS), most=128), "The older form of tools."),
    BodyField("function_call", Either((Choice(("none", "auto")), _CHOSEN_FUNCTION)), "The older form of tool_choice."),
    *CONTINUATION_FIELDS,
    BodyField("modalities", None, "Other output than text.", off=(["text"],)),
    BodyField("audio", None, "Spoken output."),
    BodyField("prediction", None, "A predicted answer."),
    BodyField("web_search_options", None, "Searching the web.", off=({},)),
    *NOT_IN_GENERATING,
    *NOT_IN_CHATS,
), "ChatCompletionRequest")  # fmt: skip


def check_continuation(body: Mapping[str, Any]) -> None:
    """That ``CONTINUATION_FIELDS`` say of an answer what the last message does. Raises ApiError 400."""
    goes_on = body["messages"][-1]["role"] == "assistant"
    for name, kept in (("continue_final_message", goes_on), ("add_generation_prompt", not goes_on)):
        if body[name] not in (None, kept):
            last = "is the assistant's: it goes on" if goes_on else "is not the assistant's: an answer begins"
            said = json.dumps(body[name])
            raise ApiError.field(
                name, f"is {said}, but the last message {last}; leave {name} out, or change the messages"
            )


@dataclass
class _Answer:
    """One answer so far."""

    reader: AnswerReader
    logprobs: AnswerLogprobs | None
    entries: list[LogprobEntry] = field(default_factory=list)
    is_told: bool = False


class ChatReply(StreamedReply):
    """Builds the reply to one request, whole or in chunks; both are the same deltas.

    Args:
        head: ``id``, ``created``, ``model`` and ``system_fingerprint``.
        readers: one an answer.
        logprobs: one an answer, None where they are not wanted.
        used: what chunks say of tokens.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        readers: Sequence[AnswerReader],
        logprobs: Sequence[AnswerLogprobs | None],
        *,
        used: UsageSoFar,
        warnings: Sequence[str] = (),
    ) -> None:
        self._head, self._used, self._warnings = dict(head), used, list(warnings)
        self._answers = [_Answer(*parts) for parts in zip(readers, logprobs, strict=True)]

    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        if not isinstance(event, NewToken):
            return []
        self._used.tokens += 1
        answer = self._answers[event.row]
        part = answer.reader.add(event.chunk)
        entries = [] if answer.logprobs is None else answer.logprobs.add(event.chunk)
        answer.entries += entries
        deltas = list(part.deltas)
        if not answer.is_told:
            answer.is_told = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        texts = [index for index, delta in enumerate(deltas) if "content" in delta]
        if entries and not texts:
            texts.append(len(deltas))
            deltas.append({"content": ""})
        chunks = [self._chunk([self._choice(event.row, delta)]) for delta in deltas]
        if entries:
            chunks[texts[-1]]["choices"][0]["logprobs"] = {"content": chat_logprobs(entries), "refusal": None}
        if part.finish_reason is not None:
            chunks.append(self._chunk([self._choice(event.row, {}, part.finish_reason)]))
        return chunks

    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._chunk([], usage)] if self._used.is_told else []

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": answer.reader.message(),
                "logprobs": None
                if answer.logprobs is None
                else {"content": chat_logprobs(answer.entries), "refusal": None},
                "finish_reason": answer.reader.finish_reason,
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
        return chunk | self._used.field(usage)
