"""What a chat format can write, found by having it write something."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.errors import ChatTemplateError, MissingDependencyError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.base import Message

__all__ = ["ArgumentsForm", "ChatAbilities"]

ArgumentsForm = type[dict[str, Any]] | type[str]

# Words that no template holds.
_TEXT, _TOOL, _KEY, _VALUE, _RESULT = "quizzical", "fathom_depth", "jackdaw", "zephyrean", "oxbowed"
_ID = "q1w2e3r4t"


def _says(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _asks_and_calls(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": _ID, "type": "function", "function": {"name": _TOOL, "arguments": arguments}}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _TOOL}
    return [_says("user", "one"), {"role": "assistant", "content": "", "tool_calls": [call]}, result]


_DEFINITION = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": _TEXT,
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}


@dataclass(frozen=True)
class ChatAbilities:
    """What a format writes of its own accord; the rest has to be put into texts.

    Attributes:
        definitions: of tools.
        calls: ``tool_calls`` and their results; how it wants their arguments: as a dict, or as JSON text. None: neither.
        tool_role: whether turns of a tool with plain text are told from those of the assistant.
        system: whether it has a system prompt at the beginning.
        late_system: whether it has system prompts further on.
    """

    definitions: bool
    calls: ArgumentsForm | None
    tool_role: bool
    system: bool
    late_system: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatAbilities:
        """Those of the tokenizer's chat format."""
        definitions = _written(tokenizer, [_says("user", "one")], tools=[_DEFINITION])
        talk = [_says("user", "one"), _says("assistant", "two")]
        return cls(
            definitions=definitions is not None and all(word in definitions for word in (_TOOL, _TEXT, _KEY)),
            calls=_arguments_form(tokenizer),
            tool_role=_is_told_apart(tokenizer, "tool", talk),
            system=_is_told_apart(tokenizer, "system", []),
            late_system=tokenizer.chat_is_native or _has_late_system(tokenizer, talk),
        )


def _written(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str | None:
    """What the format makes of messages; None where it refuses them."""
    try:
        return tokenizer.render_chat(messages, tools)
    except (ChatTemplateError, MissingDependencyError):
        return None


def _arguments_form(tokenizer: Tokenizer) -> ArgumentsForm | None:
    arguments = {_KEY: _VALUE}
    for given in (arguments, json.dumps(arguments)):
        written = _written(tokenizer, _asks_and_calls(given), tools=[_DEFINITION])
        if written is None or not all(word in written for word in (_TOOL, _RESULT)):
            continue
        # Not as Python writes a dict, and not as JSON within JSON.
        if f'"{_KEY}": "{_VALUE}"' in written or f'"{_KEY}":"{_VALUE}"' in written:
            return dict if isinstance(given, dict) else str
    return None


def _is_told_apart(tokenizer: Tokenizer, role: str, before: list[dict[str, Any]]) -> bool:
    """Whether a turn of ``role`` is written, and not as the assistant would have said it."""
    after = [_says("user", "three")]
    written = _written(tokenizer, [*before, _says(role, _TEXT), *after])
    if written is None or _TEXT not in written:
        return False
    return written != _written(tokenizer, [*before, _says("assistant", _TEXT), *after])


def _has_late_system(tokenizer: Tokenizer, before: list[dict[str, Any]]) -> bool:
    """Whether system prompts are turns of their own. Native formats say so where one cannot be."""
    alone = _written(tokenizer, [_says("system", _TEXT)])
    return alone is not None and _TEXT in alone and _is_told_apart(tokenizer, "system", before)
