"""/v1/messages: its body, read into a conversation (https://platform.claude.com/docs/en/api/messages)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_mixtral.calls.definitions import MAX_TOOLS
from mlx_mixtral.server.wire.chat import MAX_MESSAGES
from mlx_mixtral.server.wire.fields import BodyField, BodyTable, Tagged
from mlx_mixtral.server.wire.given_chat import GivenChat, call_message, result_message
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, Integer, ListOf, String
from mlx_mixtral.server.wire.sampling import CHOOSING_FIELDS, MAX_STOPS
from mlx_mixtral.server.wire.structure import WantedStructure

__all__ = [
    "COUNT_TOKENS_BODY",
    "MESSAGES_BODY",
    "VERSIONS",
    "messages_chat",
    "messages_structure",
    "tools_as_functions",
]

VERSIONS = ("2023-06-01", "2026-10-21")
"""Of the header ``anthropic-version``. The later one has no sampling parameters; here they are this server's own, in both."""

_TEXT = BodyTable((BodyField("text", String(), "The text.", required=True),), "TextBlock")
_TEXTS = Either((String(), ListOf(Tagged({"text": _TEXT}))))

_TOOL_USE = BodyTable((
    BodyField("id", String(1), "Tells calls apart.", required=True),
    BodyField("name", String(1, 64), "The tool.", required=True),
    BodyField("input", Anything(is_object=True), "Its arguments.", required=True),
), "ToolUseBlock")  # fmt: skip

_TOOL_RESULT = BodyTable((
    BodyField("tool_use_id", String(1), "The call it answers.", required=True),
    BodyField("content", _TEXTS, "The result.", ""),
    BodyField("is_error", Flag(), 'The call failed; "Error: " is put before its text.', False),
), "ToolResultBlock")  # fmt: skip

_THOUGHT = BodyTable((), "ThinkingBlock")

MESSAGE = Tagged({
    "user": BodyTable((
        BodyField(
            "content",
            Either((String(), ListOf(Tagged({"text": _TEXT, "tool_result": _TOOL_RESULT})))),
            "Text, or a list of texts and of results of calls.",
            required=True,
        ),
    ), "UserMessage"),
    "assistant": BodyTable((
        BodyField(
            "content",
            Either((String(), ListOf(Tagged({
                "text": _TEXT, "tool_use": _TOOL_USE, "thinking": _THOUGHT, "redacted_thinking": _THOUGHT,
            })))),
            "Text, or a list of texts and calls; thoughts are left out.",
            required=True,
        ),
    ), "AssistantTurn"),
    "system": BodyTable((BodyField("content", _TEXTS, "Text, or a list of texts.", required=True),), "SystemMessage"),
}, key="role")  # fmt: skip

_TOOL = BodyTable((
    BodyField("type", Choice(("custom",)), "What it is."),
    BodyField("name", String(1, 64), "Its name.", required=True),
    BodyField("description", String(), "What it does."),
    BodyField("input_schema", Anything(is_object=True), "A JSON schema of its arguments.", required=True),
    BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter."),
), "CustomTool")  # fmt: skip

_PARALLEL = BodyField("disable_parallel_tool_use", Flag(), "At most one call.", False)
_CHOICES = Tagged({
    "auto": BodyTable((_PARALLEL,)),
    "any": BodyTable((_PARALLEL,)),
    "tool": BodyTable((BodyField("name", String(1), "The tool's name.", required=True), _PARALLEL)),
    "none": BodyTable(()),
})  # fmt: skip

_FORMAT = BodyTable((
    BodyField("type", Choice(("json_schema",)), "What the answer is.", required=True),
    BodyField("schema", Anything(is_object=True), "The schema.", required=True),
))  # fmt: skip

_CONVERSATION_FIELDS = (
    BodyField("model", String(), "Its name or an alias; the model there is when it is left out."),
    BodyField("messages", ListOf(MESSAGE, 1, MAX_MESSAGES), "The conversation; its answer is generated.", required=True),
    BodyField("system", _TEXTS, "What stands before the conversation."),
    BodyField("tools", ListOf(_TOOL, most=MAX_TOOLS), "Tools the model may call."),
    BodyField("tool_choice", _CHOICES, "Whether it calls one: auto, any, none, or which."),
    BodyField(
        "thinking",
        BodyTable((BodyField("type", Choice(("disabled", "adaptive")), "Whether.", required=True),)),
        "Thoughts before the answer; this model has none.",
    ),
    BodyField(
        "output_config",
        BodyTable((
            BodyField("format", _FORMAT, "JSON of a schema."),
            BodyField("effort", String(), "Ignored."),
        )),
        "What the answer is.",
    ),
    BodyField("output_format", _FORMAT, "The older place of output_config.format."),
    BodyField("container", None, "Code that runs on the server."),
    BodyField("mcp_servers", None, "Tools that the server calls.", off=([],)),
)  # fmt: skip

COUNT_TOKENS_BODY = BodyTable(_CONVERSATION_FIELDS, "CountTokensRequest")

MESSAGES_BODY = BodyTable((
    *_CONVERSATION_FIELDS,
    BodyField("max_tokens", Integer(1), "Most tokens of the answer; the context ends it earlier when it is full."),
    BodyField("stop_sequences", ListOf(String(1), most=MAX_STOPS), "Texts that end the answer and are not part of it.", []),
    *CHOOSING_FIELDS,
    BodyField("stream", Flag(), "Send the answer as it is generated, as server-sent events.", False),
    BodyField("metadata", Anything(is_object=True), "Ignored."),
), "MessagesRequest")  # fmt: skip


def messages_chat(body: Mapping[str, Any]) -> GivenChat:
    """The conversation of a body that was read."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if body["system"]:
        messages.append({"role": "system", "content": _content(body["system"])})
        places.append("system")
    for index, message in enumerate(body["messages"]):
        place = f"messages[{index}]"
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = [_assistant(blocks)] if message["role"] == "assistant" else list(_user(message["role"], blocks))
        messages += read
        places += [place] * len(read)
    return GivenChat(messages, places)


def _assistant(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    calls = [
        call_message(block["id"], block["name"], json.dumps(block["input"], ensure_ascii=False))
        for block in blocks
        if block["type"] == "tool_use"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": texts or None}
    return message | ({"tool_calls": calls} if calls else {})


def _user(role: str, blocks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results, and the texts between them, in their order."""
    texts: list[str] = []
    for block in blocks:
        if block["type"] == "text":
            texts.append(block["text"])
            continue
        if texts:
            yield {"role": role, "content": texts}
            texts = []
        content = block["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        yield result_message(block["tool_use_id"], f"Error: {text}" if block["is_error"] else text)
    if texts or not blocks:
        yield {"role": role, "content": texts}


def _content(given: str | Sequence[Mapping[str, Any]]) -> Any:
    return given if isinstance(given, str) else [part["text"] for part in given]


def tools_as_functions(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a body that was read says of tools, as arguments of ``read_tools``."""
    choice = body["tool_choice"] or {}
    return {
        "tools": [
            {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
                "strict": tool["strict"],
            }
            for tool in body["tools"] or ()
        ],
        "tool_choice": {key: choice[key] for key in ("type", "name") if key in choice} or None,
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
    }


def messages_structure(body: Mapping[str, Any]) -> WantedStructure | None:
    """The schema an answer has to keep; None for any text."""
    config = body["output_config"] or {}
    for place, given in (("output_config.format", config.get("format")), ("output_format", body["output_format"])):
        if given is not None:
            return WantedStructure(f"{place}.schema", "json", given["schema"])
    return None
