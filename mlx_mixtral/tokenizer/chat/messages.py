"""Which lists of messages are conversations; one line of error for those that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.tokenizer.base import Message

__all__ = ["ROLES", "check_messages", "check_order", "check_tools", "fail"]

ROLES = ("system", "user", "assistant", "tool")

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_FOLLOWS = {
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}


def fail(index: int, problem: str) -> NoReturn:
    """Raise ChatTemplateError about the message at `index`."""
    raise ChatTemplateError(f"messages[{index}]: {problem}")


def check_messages(messages: Sequence[Message]) -> None:
    """Check what every format needs: roles, string contents, something to answer.

    Raises:
        ChatTemplateError: Which message, what is wrong, what to write instead.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f"messages must be a list of dicts with role and content, got {type(messages).__name__}"
        )
    if not messages:
        raise ChatTemplateError('messages is empty; give at least one, {"role": "user", "content": "…"}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            fail(index, f'must be a dict like {{"role": "user", "content": "…"}}, got {type(message).__name__}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            fail(index, f"unknown role {role!r}; use one of {', '.join(ROLES)}")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            fail(
                index,
                f"content of a {role} message must be a str, got {type(content).__name__}; join text parts yourself",
            )
    if messages[-1]["role"] == "assistant":
        fail(len(messages) - 1, "the last message is the assistant's; end with a user or tool message to be answered")


def check_order(messages: Sequence[Message], *, tools_known: bool) -> None:
    """Check what Mistral's native formats need on top, along the lines of mistral-common's validators.

    Args:
        messages: Messages that passed `check_messages`.
        tools_known: Whether the format can write tool calls and results (v3).

    Raises:
        ChatTemplateError: Which message, what is wrong, what to write instead.
    """
    if messages[0]["role"] in ("assistant", "tool"):
        fail(0, f"a conversation starts with a system or user message, not with {messages[0]['role']}")
    unanswered = 0
    for index, message in enumerate(messages):
        role = message["role"]
        if index and role not in _FOLLOWS[messages[index - 1]["role"]]:
            fail(index, f"{role} cannot follow {messages[index - 1]['role']}; expected {_either(messages[index - 1])}")
        calls = message.get("tool_calls") if role == "assistant" else None
        if (role == "tool" or calls) and not tools_known:
            fail(index, "this model's format (mistral-v1) has no tools; leave out tool messages and tool_calls")
        if role == "assistant":
            if unanswered:
                fail(
                    index,
                    f"{abs(unanswered)} tool results too {'few' if unanswered > 0 else 'many'} before this message",
                )
            if not message.get("content") and not calls:
                fail(index, "an assistant message needs content or tool_calls")
            unanswered = len(_check_calls(index, calls)) if calls else 0
        elif role == "tool":
            unanswered -= 1
            _check_result(index, message)
    if unanswered:
        few = "few" if unanswered > 0 else "many"
        fail(len(messages) - 1, f"{abs(unanswered)} tool results too {few} at the end; give one for each tool call")


def _either(message: Message) -> str:
    return " or ".join(_FOLLOWS[message["role"]])


def _check_calls(index: int, calls: Any) -> Sequence[Any]:
    if not isinstance(calls, (list, tuple)):
        fail(index, f"tool_calls must be a list, got {type(calls).__name__}")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            fail(index, 'each of tool_calls must be {"id": …, "function": {"name": …, "arguments": …}}')
        _check_name(f"messages[{index}]: tool call", function.get("name"))
        if not isinstance(function.get("arguments", {}), (str, Mapping, type(None))):
            fail(index, "arguments of a tool call must be a JSON string or a dict")
        _check_call_id(index, "id", call.get("id"))
    return calls


def _check_result(index: int, message: Message) -> None:
    _check_call_id(index, "tool_call_id", message.get("tool_call_id"))
    if message.get("name") is not None:
        _check_name(f"messages[{index}]: tool result", message["name"])


def _check_call_id(index: int, key: str, value: Any) -> None:
    if not isinstance(value, str) or not _CALL_ID.fullmatch(value):
        fail(index, f"{key} is {value!r}, but must be 9 letters or digits (this format was trained on such)")


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ChatTemplateError(f"{where} name is {name!r}, but must be 1 to 64 of a-z, A-Z, 0-9, underscore and dash")


def check_tools(tools: Sequence[Message]) -> list[dict[str, Any]]:
    """Tools in the order of keys Mistral's format writes, with defaults filled in.

    Raises:
        ChatTemplateError: A tool is not `{"type": "function", "function": {"name": …, "parameters": {…}}}`.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ChatTemplateError(f"tools must be a list of dicts, got {type(tools).__name__}")
    written = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise ChatTemplateError(f'tools[{index}] must be {{"type": "function", "function": {{"name": …}}}}')
        _check_name(f"tools[{index}]:", function.get("name"))
        description, parameters = function.get("description") or "", function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise ChatTemplateError(f"tools[{index}]: description must be a str and parameters a JSON schema (a dict)")
        function = {"name": function["name"], "description": description, "parameters": parameters}
        written.append({"type": "function", "function": function})
    return written
