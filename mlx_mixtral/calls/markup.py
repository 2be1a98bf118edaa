"""What a way of writing calls has to say for itself: where calls begin and end, and how they stand in a prompt."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.calls.definitions import Tool, ToolUse
from mlx_mixtral.calls.turns import ToolCall

__all__ = ["Delimiters", "Markup", "json_value"]


@dataclass(frozen=True)
class Delimiters:
    """Where calls begin and end in what a model writes.

    Attributes:
        begin_id: the control token that begins them; None: ``begin`` is text.
        begin: pieces of text that begin them, white space between any two; none where ``begin_id`` does.
        is_list: calls stand in a list, its bracket the first character after ``begin``; otherwise each has its own ``begin``.
        end_id: the control token that ends them, and has no text.
        end: pieces of text that end them.
        anywhere: they may begin behind other text; otherwise only at the start of an answer.
    """

    begin_id: int | None = None
    begin: tuple[str, ...] = ()
    is_list: bool = True
    end_id: int | None = None
    end: tuple[str, ...] = ()
    anywhere: bool = True


class Markup(ABC):
    """One way of writing calls.

    Attributes:
        name: as ``--tools`` takes it.
        delimiters: what the parser looks for.
        reserved_key: what an object that is no call may not have, where calls are objects too; "" where they are told apart.
        has_tool_role: whether results are turns of the role "tool" where the chat format has it; otherwise they are the user's.
    """

    name: str
    delimiters: Delimiters
    reserved_key = ""
    has_tool_role = True

    @abstractmethod
    def instructions(self, tools: Sequence[Tool]) -> str:
        """What the system prompt says for a chat format that writes no definitions itself."""

    @abstractmethod
    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        """Calls of an earlier answer, for a chat format that writes none itself."""

    @abstractmethod
    def write_results(self, results: Sequence[tuple[ToolCall, str]]) -> str:
        """What they gave."""

    @abstractmethod
    def rules(self, use: ToolUse, answer: str | None) -> str:
        """Lark rules for an answer, ``start`` among them; they may use those of ``grammar.call_rules``.

        Args:
            answer: the rule that text has to keep; None: any text.
        """


def json_value(text: str) -> Any:
    """The JSON that a text holds, the text itself where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
