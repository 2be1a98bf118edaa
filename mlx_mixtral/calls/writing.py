"""Turns to token ids: what a chat format cannot write itself goes into the texts of what it can."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, takewhile
from typing import Any

from mlx_mixtral.calls.abilities import ArgumentsForm, ChatAbilities
from mlx_mixtral.calls.definitions import Tool
from mlx_mixtral.calls.markup import Markup
from mlx_mixtral.calls.turns import ToolCall, Turn, Turns
from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["ChatWriter"]

_BLANK_LINE = "\n\n"


class ChatWriter:
    """Writes conversations with a tokenizer's chat format and a markup for calls.

    Args:
        is_own: whether the markup is the one that the chat format writes for ``tool_calls``.
    """

    def __init__(self, tokenizer: Tokenizer, markup: Markup, *, is_own: bool) -> None:
        self._tokenizer, self._markup = tokenizer, markup
        self._abilities = ChatAbilities.of(tokenizer)
        self._defines = is_own and self._abilities.definitions
        self._arguments = self._abilities.calls if is_own else None

    def ids(self, conversation: Turns, tools: Sequence[Tool]) -> list[int]:
        """Token ids from which the answer is generated.

        Raises:
            ChatTemplateError: the format cannot write the conversation in any way.
            InvalidRequestError: a text holds a lone surrogate.
        """
        refused = None
        for messages, definitions in self.messages(conversation, tools):
            try:
                ids = self._tokenizer.encode_chat(messages, definitions)
                break
            except ChatTemplateError as error:
                refused = refused or error
        else:
            assert refused is not None
            raise refused
        if not conversation.begun:
            return ids
        if self._tokenizer.chat_is_native:
            return ids + self._tokenizer.encode(conversation.begun, bos=False)
        return ids + self._tokenizer.encode_plain(conversation.begun, first=False)

    def messages(
        self, conversation: Turns, tools: Sequence[Tool]
    ) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
        """Messages and definitions for ``encode_chat``: as they are; then, for formats that refuse some orders of roles, with
        the system prompts as one, with user and assistant in turn, and without a system prompt."""
        definitions = [tool.definition for tool in tools] if tools and self._defines else None
        turns = self._in_texts(list(conversation.turns))
        if tools and not self._defines:
            turns = _with_system(turns, self._markup.instructions(tools))
        if not self._abilities.late_system or not self._abilities.system:
            turns = _system_first(turns)
        if not self._abilities.system:
            turns = _system_in_user(turns)
        tried = []
        for relaxed in (_same, _system_first, _alternating, _system_in_user):
            turns = relaxed(turns)
            if turns not in tried:
                tried.append(turns)
                yield [self._message(turn) for turn in turns], definitions

    def _in_texts(self, turns: list[Turn]) -> list[Turn]:
        """Calls and results as texts, where the format cannot write them."""
        if self._arguments is not None:
            return turns
        written: list[Turn] = []
        for is_result, run in groupby(turns, lambda turn: turn.call is not None):
            if is_result:
                role = "tool" if self._markup.has_tool_role and self._abilities.tool_role else "user"
                results = [(turn.call, turn.text) for turn in run if turn.call is not None]
                written.append(Turn(role, self._markup.write_results(results)))
            else:
                written += [
                    Turn(
                        turn.role, _joined(turn.text, self._markup.write_calls(turn.calls)) if turn.calls else turn.text
                    )
                    for turn in run
                ]
        return written

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.calls and self._arguments is not None:
            message["tool_calls"] = [_call(call, self._arguments) for call in turn.calls]
        if turn.call is not None:
            message |= {"tool_call_id": turn.call.id, "name": turn.call.name}
        return message


def _call(call: ToolCall, form: ArgumentsForm) -> dict[str, Any]:
    arguments: Any = call.arguments
    if form is dict:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = call.arguments
    return {**call.message, "function": {"name": call.name, "arguments": arguments}}


def _joined(*texts: str) -> str:
    return _BLANK_LINE.join(text for text in texts if text)


def _with_system(turns: list[Turn], text: str) -> list[Turn]:
    """The same with a text at the end of the first system prompt."""
    if turns and turns[0].role == "system":
        return [replace(turns[0], text=_joined(turns[0].text, text)), *turns[1:]]
    return [Turn("system", text), *turns]


def _same(turns: list[Turn]) -> list[Turn]:
    return turns


def _system_first(turns: list[Turn]) -> list[Turn]:
    """All system prompts as one at the beginning; one behind the last answer is the user's, as something has to be answered."""
    rest = [turn for turn in turns if turn.role != "system"]
    after = list(takewhile(lambda turn: turn.role == "system", reversed(turns)))[::-1]
    is_answered = bool(rest) and rest[-1].role == "assistant"
    first = [turn for turn in turns[: len(turns) - len(after) * is_answered] if turn.role == "system"]
    if is_answered or not rest:
        rest.append(Turn("user", _joined(*(turn.text for turn in after)) if is_answered else ""))
    text = _joined(*(turn.text for turn in first))
    return [Turn("system", text), *rest] if text else rest


def _alternating(turns: list[Turn]) -> list[Turn]:
    """User and assistant in turn, the user first."""
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and last.role == turn.role and turn.role != "tool" and not (last.calls or turn.calls):
            merged[-1] = replace(last, text=_joined(last.text, turn.text))
        else:
            merged.append(turn)
    first = int(bool(merged) and merged[0].role == "system")
    if len(merged) == first or merged[first].role == "assistant":
        merged.insert(first, Turn("user"))
    return merged


def _system_in_user(turns: list[Turn]) -> list[Turn]:
    """The system prompt in the first turn of the user."""
    if not turns or turns[0].role != "system":
        return turns
    turns, text = _alternating(turns), turns[0].text
    return [replace(turns[1], text=_joined(text, turns[1].text)), *turns[2:]]
