"""Mistral's native chat formats, written as token ids, never as one text that is read again.

v1 (Mixtral 8x7B) writes "[INST] … [/INST]" as plain text; v3 (8x22B) has control ids for its markers and knows tools.
Every segment is encoded on its own, with its own dummy prefix. Source: mistral-common, `InstructTokenizerV1` and `V3`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.tokenizer.base import Message, Tokenizer
from mlx_mixtral.tokenizer.chat.messages import check_messages, check_order, check_tools

__all__ = ["MistralV1", "MistralV3", "NoChat"]

_BLANK_LINE = "\n\n"


class _Native(ABC):
    """A format that is written as ids: its text is what they spell."""

    name: str
    is_native = True

    @property
    def source(self) -> str:
        return self.name

    @abstractmethod
    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None
    ) -> list[int]: ...

    def end_of_turn(self, tokenizer: Tokenizer) -> int | str | None:
        """EOS ends an answer."""
        return tokenizer.eos_token_id

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str:
        """`<s> [INST] Hi [/INST]`."""
        text = ""
        for hidden, run in groupby(self.encode(tokenizer, messages, tools), lambda i: tokenizer.surface(i) is None):
            ids = list(run)
            text += "".join(map(tokenizer.id_to_piece, ids)) if hidden else tokenizer.decode(ids, continues=True)
        return text


class NoChat(_Native):
    """A checkpoint with no chat format: every conversation is an error."""

    name = "none"

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[int]:
        raise ChatTemplateError(
            "this checkpoint has no chat format: no chat_template, and no [INST] among its special tokens; "
            "give --chat-template FILE or NAME, or use generate with a prompt of your own"
        )


class MistralV1(_Native):
    """BOS, then `[INST] {system}\\n\\n{user} [/INST]` for the first user turn, answers followed by EOS."""

    name = "mistral-v1"

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[int]:
        check_messages(messages)
        check_order(messages, tools_known=False)
        if tools:
            raise ChatTemplateError("this model's format (mistral-v1) has no tools; leave out `tools`")
        system, turns = _turns(messages)
        ids = _start(tokenizer)
        first = True
        for role, turn in turns:
            text = _joined(turn)
            if role == "user":
                text = f"{system}{_BLANK_LINE}{text}" if first and system else text
                ids += tokenizer.encode(f"[INST] {text} [/INST]", bos=False)
                first = False
            else:
                ids += [*tokenizer.encode(text, bos=False), _eos(tokenizer)]
        return ids


class MistralV3(_Native):
    """Control ids around each user turn; tools before the last one; tool calls and results as JSON."""

    name = "mistral-v3"

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[int]:
        check_messages(messages)
        check_order(messages, tools_known=True)
        system, turns = _turns(messages)
        last_user = max(index for index, (role, _) in enumerate(turns) if role == "user")
        ids = _start(tokenizer)
        for index, (role, turn) in enumerate(turns):
            if role == "user":
                text = _joined(turn)
                if index == last_user:
                    ids += self._tools(tokenizer, tools)
                    text = f"{system}{_BLANK_LINE}{text}" if system else text
                ids += _between(tokenizer, "[INST]", text, "[/INST]")
            elif role == "assistant":
                ids += [*self._answer(tokenizer, turn), _eos(tokenizer)]
            else:
                for message in turn:
                    result = {"content": _json(message["content"]), "call_id": message["tool_call_id"]}
                    ids += _between(tokenizer, "[TOOL_RESULTS]", _dumps(result), "[/TOOL_RESULTS]")
        return ids

    def _tools(self, tokenizer: Tokenizer, tools: Sequence[Message] | None) -> list[int]:
        if not tools:
            return []
        return _between(tokenizer, "[AVAILABLE_TOOLS]", _dumps(check_tools(tools)), "[/AVAILABLE_TOOLS]")

    def _answer(self, tokenizer: Tokenizer, turn: Sequence[Message]) -> list[int]:
        """Text, then calls. Mistral's own v3 has one or the other; both stand in this order from its v7 on."""
        calls = [call for message in turn for call in message.get("tool_calls") or ()]
        text = _joined(turn).rstrip(" ")
        ids = tokenizer.encode(text, bos=False) if text or not calls else []
        if not calls:
            return ids
        written = [
            {"name": call["function"]["name"], "arguments": _json(call["function"].get("arguments")), "id": call["id"]}
            for call in calls
        ]
        return [*ids, _marker(tokenizer, "[TOOL_CALLS]"), *tokenizer.encode(_dumps(written), bos=False)]


def _turns(messages: Sequence[Message]) -> tuple[str, list[tuple[str, list[Message]]]]:
    """The system prompts as one text, and runs of messages of one role; a system message ends a run.

    A conversation that does not begin with the user (a system prompt alone) gets an empty user turn.
    """
    system = _joined([message for message in messages if message["role"] == "system"])
    turns = [(role, list(run)) for role, run in groupby(messages, key=lambda message: str(message["role"]))]
    turns = [turn for turn in turns if turn[0] != "system"]
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", []))
    return system, turns


def _joined(messages: Sequence[Message]) -> str:
    return _BLANK_LINE.join(message["content"] for message in messages if message.get("content"))


def _json(value: str | Mapping[str, Any] | None) -> Any:
    """The JSON a text holds, the text itself when it holds none."""
    if not value:
        return {}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    except RecursionError:
        raise ChatTemplateError("the JSON of a tool call or result is nested too deeply") from None


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"tools and tool calls must hold what JSON can write ({error})") from error


def _between(tokenizer: Tokenizer, begin: str, text: str, end: str) -> list[int]:
    return [_marker(tokenizer, begin), *tokenizer.encode(text, bos=False), _marker(tokenizer, end)]


def _marker(tokenizer: Tokenizer, content: str) -> int:
    token_id = tokenizer.special_id(content)
    if token_id is None:
        raise ChatTemplateError(f"this vocabulary has no {content} token, so it cannot write tools in the v3 format")
    return token_id


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ChatTemplateError(
            "this tokenizer has no EOS token to end an assistant turn with; give eos_token in its config"
        )
    return tokenizer.eos_token_id
