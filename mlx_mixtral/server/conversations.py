"""Messages as clients send them, in any order of roles, as conversations that a chat format can write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.errors import ChatTemplateError, MixtralError
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.base import Message

__all__ = ["encode_conversation", "plain_messages"]

_BLANK_LINE = "\n\n"


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a checked body with texts as strings: parts joined, refusals as content, ``developer`` as ``system``."""
    plain = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] if part["type"] == "text" else part["refusal"] or "" for part in content)
        if content is None:
            content = message["refusal"]
        role = "system" if message["role"] == "developer" else message["role"]
        calls = message["tool_calls"] if role == "assistant" and message["tool_calls"] else None
        made: dict[str, Any] = {"role": role, "content": content if content is not None or calls else ""}
        if calls:
            made["tool_calls"] = calls
        if role == "tool":
            made["tool_call_id"] = message["tool_call_id"] or ""
            if message["name"]:
                made["name"] = message["name"]
        plain.append(made)
    return plain


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids from which the next turn is generated. A last message of the assistant's is gone on with.

    The conversation is written as it is where the format can; else with its roles mended: messages of one role in a row are one,
    a system prompt in the middle belongs to the user's turn there, and tools' results to the user's where the format has none.

    Raises:
        ApiError: 400: no format could write it.
    """
    begun = ""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        begun, messages = messages[-1]["content"] or "", messages[:-1]
    try:
        try:
            ids = tokenizer.encode_chat(messages, tools)
        except ChatTemplateError as error:
            mended = _mended(messages)
            if mended == list(messages):
                raise
            try:
                ids = tokenizer.encode_chat(mended, tools)
            except ChatTemplateError:
                raise error from None
        # An answer begins with a text of its own in a native format; behind a template's marker it goes on.
        return ids + tokenizer.encode_plain(begun, first=tokenizer.chat_is_native) if begun else ids
    except MixtralError as error:
        raise ApiError(400, str(error), "messages", code="invalid_value") from None


def _mended(messages: Sequence[Message]) -> list[Message]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            name = message.get("name") or "the tool"
            role, text = "user", f"Result of {name}: {text}"
        elif role == "system" and any(turn["role"] != "system" for turn in turns):
            role = "user"
        for call in message.get("tool_calls") or ():
            function = call["function"]
            called = f"Call of {function['name']}: {function['arguments']}"
            text = f"{text}{_BLANK_LINE}{called}" if text else called
        if turns and turns[-1]["role"] == role:
            joined = (turns[-1]["content"], text)
            turns[-1]["content"] = _BLANK_LINE.join(part for part in joined if part)
        else:
            turns.append({"role": role, "content": text})
    first = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if first == len(turns) or turns[first]["role"] != "user":
        turns.insert(first, {"role": "user", "content": ""})
    return list(turns)
