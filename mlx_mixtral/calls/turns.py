"""Messages as clients send them, in any order of roles, read into turns that every chat format can be given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_mixtral.arguments import shown
from mlx_mixtral.calls.ids import nine_characters
from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.tokenizer.base import Message
from mlx_mixtral.tokenizer.chat.messages import fail

__all__ = ["ToolCall", "Turn", "Turns", "read_conversation"]

NO_RESULT = "There is no result."
"""Stands where a client sent none: formats with tools want one for each call."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: ``arguments`` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> dict[str, Any]:
        """As ``tool_calls`` of a message lists it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Turn:
    """What one message says. ``role`` is system, user, assistant or tool; a tool's turn has the ``call`` it answers."""

    role: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    call: ToolCall | None = None


@dataclass(frozen=True)
class Turns:
    """Turns up to the one that is to be written, and what of that is already there.

    Attributes:
        begun: text of the assistant that the conversation ended with: the answer goes on from it.
    """

    turns: tuple[Turn, ...]
    begun: str = ""


def read_conversation(messages: Sequence[Message]) -> Turns:
    """Read messages of OpenAI's form.

    ``developer`` is the system; parts of text are joined; ids of calls become nine letters or digits. Each result stands behind
    the call it answers, a call without one gets ``NO_RESULT``, and a result of no call is a user's text. An assistant's message
    that says nothing is left out; one with text at the end begins the answer.

    Raises:
        ChatTemplateError: what is no message, or not text; it names the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(f"messages is {shown(messages)}; it must be a list of at least one message")
    reader = _TurnReader()
    for index, message in enumerate(messages):
        reader.add(index, message)
    turns = reader.finished()
    begun = ""
    if turns and turns[-1].role == "assistant":
        begun = turns.pop().text.rstrip(" ")
    if all(turn.role == "assistant" for turn in turns):
        turns.insert(0, Turn("user"))
    return Turns(tuple(turns), begun)


class _TurnReader:
    def __init__(self) -> None:
        # Turns without results, and for each turn with calls the results of them, in the order they came.
        self._turns: list[Turn] = []
        self._results: dict[int, list[Turn]] = {}
        # Calls without a result: the id a client knows it by, the number of its turn, and the call.
        self._open: list[tuple[str, int, ToolCall]] = []

    def add(self, index: int, message: object) -> None:
        if not isinstance(message, Mapping):
            fail(index, f'must be an object like {{"role": "user", "content": "…"}}, got {type(message).__name__}')
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            fail(index, f"unknown role {shown(role)}; use one of {', '.join(_ROLES)}")
        kind = _ROLES[role]
        calls = _calls(index, message) if kind == "assistant" else []
        text = _text(index, kind, message.get("content"), may_be_none=kind == "assistant")
        if kind == "tool":
            self._add_result(index, message, text)
        elif text or calls or kind != "assistant":
            number = len(self._turns)
            self._turns.append(Turn(kind, text, tuple(call for _, call in calls)))
            self._open += [(known, number, call) for known, call in calls]

    def _add_result(self, index: int, message: Mapping[str, Any], text: str) -> None:
        known, name = message.get("tool_call_id"), message.get("name")
        if not isinstance(known, str | None) or not isinstance(name, str | None):
            fail(index, "tool_call_id and name of a tool's message must be text")
        place = self._answered(known, name)
        if place is None:
            self._turns.append(Turn("user", text))
            return
        _, number, call = self._open.pop(place)
        self._results.setdefault(number, []).append(Turn("tool", text, call=call))

    def _answered(self, known: str | None, name: str | None) -> int | None:
        """Which open call a result answers: the last of its id, for clients that count from zero in each turn; the first of its
        name or of all where it has no id."""
        places = range(len(self._open))
        if known:
            return next((place for place in reversed(places) if self._open[place][0] == known), None)
        return next((place for place in places if name in (None, self._open[place][2].name)), None)

    def finished(self) -> list[Turn]:
        for _, number, call in self._open:
            self._results.setdefault(number, []).append(Turn("tool", NO_RESULT, call=call))
        turns: list[Turn] = []
        for number, turn in enumerate(self._turns):
            last = turns[-1] if turns else None
            if last is not None and turn.calls and last.role == "assistant" and not last.calls:
                # Some clients send an answer's text and its calls as two messages.
                turns[-1] = replace(turn, text="\n\n".join(filter(None, (last.text, turn.text))))
            else:
                turns.append(turn)
            turns += self._results.get(number, ())
        return turns


def _text(index: int, role: str, content: object, *, may_be_none: bool) -> str:
    if content is None and may_be_none:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        fail(index, f"content of a {role} message must be text or a list of parts, got {type(content).__name__}")
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            parts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in (*_TEXT_PARTS, "refusal"):
            fail(index, f"content[{number}] is of type {shown(kind)}; this model reads text only")
        if not isinstance(text, str):
            fail(index, f"content[{number}].text must be text, got {type(text).__name__}")
        parts.append(text)
    # As Mistral's own code joins them: results of tools may be JSON that was cut anywhere.
    return ("" if role == "tool" else "\n\n").join(parts)


def _calls(index: int, message: Mapping[str, Any]) -> list[tuple[str, ToolCall]]:
    """Calls of an assistant's message with the ids its client knows them by."""
    listed, old = message.get("tool_calls"), message.get("function_call")
    if not isinstance(listed, list | tuple | None):
        fail(index, f"tool_calls must be a list, got {type(listed).__name__}")
    read = [_call(index, f"tool_calls[{number}]", number, each) for number, each in enumerate(listed or ())]
    if not read and old is not None:
        read.append(_call(index, "function_call", 0, {"function": old}))
    return read


def _call(index: int, place: str, number: int, given: object) -> tuple[str, ToolCall]:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping):
        fail(index, f'{place} must be {{"id": …, "function": {{"name": …, "arguments": …}}}}')
    known, name, arguments = given.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        fail(index, f"{place}.function.name is {shown(name)}; it must be 1 to 64 of a-z, A-Z, 0-9, underscore and dash")
    if not isinstance(known, str | None):
        fail(index, f"{place}.id is {shown(known)}; it must be text")
    if not isinstance(arguments, str | Mapping | None):
        fail(index, f"{place}.function.arguments must be JSON text, got {type(arguments).__name__}")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            fail(index, f"{place}.function.arguments hold what JSON cannot write")
    return known or "", ToolCall(nine_characters(known or f"{index}.{number}.{name}"), name, arguments or "{}")
