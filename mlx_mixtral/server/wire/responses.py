"""/v1/responses: its body, read into a conversation (https://platform.openai.com/docs/api-reference/responses).

Nothing is stored: a client sends all turns each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.calls.definitions import MAX_TOOLS
from mlx_mixtral.server.wire.chat import MAX_MESSAGES
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable, Tagged
from mlx_mixtral.server.wire.given_chat import GivenChat, call_message, result_message
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, Integer, ListOf, MapOf, String
from mlx_mixtral.server.wire.sampling import CHOOSING_FIELDS, COMMON_FIELDS, MAX_TOP_LOGPROBS
from mlx_mixtral.server.wire.structure import WantedStructure
from mlx_mixtral.server.wire.unsupported import NOT_IN_GENERATING

__all__ = ["LOGPROBS", "RESPONSES_BODY", "responses_chat", "responses_structure", "wanted_logprobs"]

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA, MAX_METADATA_CHARACTERS = 16, 512

_TEXT = BodyTable((BodyField("text", String(), "The text.", required=True),), "InputText")
_REFUSAL = BodyTable((BodyField("refusal", String(), "The text.", required=True),), "InputRefusal")
_PARTS = {"input_text": _TEXT, "output_text": _TEXT, "text": _TEXT}

_MESSAGE = BodyTable((
    BodyField("role", Choice(("user", "assistant", "system", "developer")), "Who speaks.", required=True),
    BodyField(
        "content",
        Either((String(), ListOf(Tagged(_PARTS | {"refusal": _REFUSAL})))),
        "Text, or a list of texts.",
        required=True,
    ),
), "InputMessage")  # fmt: skip

_CALL = BodyTable((
    BodyField("call_id", String(1), "Tells calls apart.", required=True),
    BodyField("name", String(1, 64), "The function.", required=True),
    BodyField("arguments", String(), "Its arguments, as JSON text.", required=True),
), "FunctionCall")  # fmt: skip

_RESULT = BodyTable((
    BodyField("call_id", String(1), "The call it answers.", required=True),
    BodyField("output", Either((String(), ListOf(Tagged(_PARTS)))), "The result.", required=True),
), "FunctionCallOutput")  # fmt: skip

ITEM = Tagged({
    "message": _MESSAGE,
    "function_call": _CALL,
    "function_call_output": _RESULT,
    "reasoning": BodyTable((), "Reasoning"),
}, usual="message")  # fmt: skip

_TOOL = BodyTable((
    BodyField("type", Choice(("function",)), "What it is.", "function"),
    BodyField("name", String(1, 64), "Its name.", required=True),
    BodyField("description", String(), "What it does."),
    BodyField("parameters", Anything(is_object=True), "A JSON schema of its arguments."),
    BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter.", False),
), "FlatTool")  # fmt: skip

_NAMED = BodyTable((BodyField("name", String(1), "The function's name.", required=True),))
_TOOL_CHOICE = Either((
    Choice(("none", "auto", "required")),
    Tagged({
        "function": _NAMED,
        "allowed_tools": BodyTable((
            BodyField("mode", Choice(("auto", "required")), "Whether one must be called.", required=True),
            BodyField("tools", ListOf(Tagged({"function": _NAMED}), 1), "Which.", required=True),
        )),
    }),
))  # fmt: skip

_FORMAT = Tagged({
    "text": BodyTable(()),
    "json_object": BodyTable(()),
    "json_schema": BodyTable((
        BodyField("name", String(), "Given back.", "answer"),
        BodyField("description", String(), "Given back."),
        BodyField("schema", Anything(is_object=True), "The schema.", required=True),
        BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter.", False),
    )),
})  # fmt: skip

_STORED = "nothing is stored here: send the whole conversation as input"

RESPONSES_BODY = BodyTable((
    BodyField(
        "input",
        Either((String(1), ListOf(ITEM, 1, MAX_MESSAGES))),
        "A text, or the items of a conversation; its answer is generated.",
        required=True,
    ),
    BodyField("instructions", String(), "What stands before the conversation."),
    *(field for field in COMMON_FIELDS if field.name not in ("user", "metadata")),
    BodyField("user", String(), "Given back."),
    BodyField("metadata", MapOf(String(0, MAX_METADATA_CHARACTERS), MAX_METADATA), "Given back.", {}),
    BodyField("max_output_tokens", Integer(1), "Most tokens of the answer; the context ends it earlier when it is full."),
    *CHOOSING_FIELDS,
    BodyField("include", ListOf(String()), f"What the reply holds beside the rest: {LOGPROBS}; others are ignored.", []),
    BodyField("top_logprobs", Integer(0, MAX_TOP_LOGPROBS), f"Likeliest tokens in place of each; with {LOGPROBS} in include."),
    BodyField("stream", Flag(), "Send the answer as it is generated, as server-sent events.", False),
    BodyField(
        "stream_options",
        BodyTable((BodyField("include_obfuscation", Flag(), "Ignored: nothing is padded.", False),)),
        "Only with stream.",
    ),
    BodyField("tools", ListOf(_TOOL, most=MAX_TOOLS), "Functions the model may call.", []),
    BodyField("tool_choice", _TOOL_CHOICE, "Whether it calls one: none, auto, required, or which.", "auto"),
    BodyField("parallel_tool_calls", Flag(), "Whether an answer may hold several calls.", True),
    BodyField("max_tool_calls", Integer(1), "Of tools that the server calls; there are none."),
    BodyField(
        "text",
        BodyTable((
            BodyField("format", _FORMAT, "JSON, or JSON of a schema."),
            BodyField("verbosity", Choice(("low", "medium", "high")), "Ignored."),
        )),
        "What the answer is.",
    ),
    BodyField("reasoning", Anything(is_object=True), "Ignored: this model answers at once."),
    BodyField("previous_response_id", None, "Going on from an earlier reply.", instead=_STORED),
    BodyField("conversation", None, "Going on from what is stored.", instead=_STORED),
    BodyField("prompt", None, "A stored prompt.", instead="give its text as instructions"),
    BodyField("background", None, "Answering later.", off=(False,)),
    BodyField("truncation", None, "Leaving out turns.", off=("disabled",), instead="leave out earlier items of input yourself"),
    *NOT_IN_GENERATING,
), "ResponsesRequest")  # fmt: skip


def responses_chat(body: Mapping[str, Any]) -> GivenChat:
    """The conversation of a body that was read; calls that follow one another are one message."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if body["instructions"]:
        messages.append({"role": "system", "content": body["instructions"]})
        places.append("instructions")
    given = body["input"]
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    for index, item in enumerate(items):
        if item["type"] == "reasoning":
            continue
        if item["type"] == "function_call":
            call = call_message(item["call_id"], item["name"], item["arguments"] or "{}")
            if messages and "tool_calls" in messages[-1]:
                messages[-1]["tool_calls"].append(call)
                continue
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif item["type"] == "function_call_output":
            messages.append(result_message(item["call_id"], "".join(_texts(item["output"]))))
        else:
            messages.append({"role": item["role"], "content": _texts(item["content"])})
        places.append("input" if isinstance(given, str) else f"input[{index}]")
    if not messages:
        raise ApiError.field("input", "holds nothing but reasoning; it must have a message")
    return GivenChat(messages, places, "input")


def _texts(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["refusal"] if part["type"] == "refusal" else part["text"] for part in content]


def responses_structure(body: Mapping[str, Any]) -> WantedStructure | None:
    """What ``text.format`` asks for; None for any text."""
    described = (body["text"] or {}).get("format")
    if described is None or described["type"] == "text":
        return None
    if described["type"] == "json_object":
        return WantedStructure("text.format", "json_object")
    return WantedStructure("text.format.schema", "json", described["schema"], described["strict"])


def wanted_logprobs(body: Mapping[str, Any]) -> int | None:
    """Likeliest tokens that are wanted beside each; None for no log-probabilities. Raises ApiError 400."""
    if LOGPROBS in body["include"]:
        return body["top_logprobs"] or 0
    if body["top_logprobs"]:
        raise ApiError.field("top_logprobs", f'needs include: ["{LOGPROBS}"]')
    return None
