"""Calls as Mistral's v3 writes them: ``[TOOL_CALLS]``, a control token, and a list in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mlx_mixtral.calls.definitions import Tool, ToolUse
from mlx_mixtral.calls.grammar import ANY_TEXT, COMMA, call_rules, repeated
from mlx_mixtral.calls.markup import Delimiters, Markup, json_value
from mlx_mixtral.calls.turns import ToolCall
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["MARKER", "MistralCalls"]

MARKER = "[TOOL_CALLS]"


class MistralCalls(Markup):
    """The token decodes to nothing, so it is known by its id alone; what a text spells is text.

    Raises:
        InvalidRequestError: the vocabulary has no such token.
    """

    name = "mistral"

    def __init__(self, tokenizer: Tokenizer) -> None:
        token_id = tokenizer.special_id(MARKER)
        if token_id is None:
            raise InvalidRequestError(
                f"tools mistral needs the control token {MARKER}, which is not there; use generic"
            )
        self._token_id = token_id
        self.delimiters = Delimiters(begin_id=token_id)

    def instructions(self, tools: Sequence[Tool]) -> str:
        return "Available tools: " + json.dumps([tool.definition for tool in tools], ensure_ascii=False)

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = [{"name": call.name, "arguments": json_value(call.arguments), "id": call.id} for call in calls]
        return json.dumps(written, ensure_ascii=False)

    def write_results(self, results: Sequence[tuple[ToolCall, str]]) -> str:
        written = [{"content": json_value(text), "call_id": call.id} for call, text in results]
        return "\n".join(json.dumps(each, ensure_ascii=False) for each in written)

    def rules(self, use: ToolUse, answer: str | None) -> str:
        text = answer or ANY_TEXT
        if use.mode == "none" or not use.callable_tools:
            return f"start: {text}"
        listed = repeated("call", COMMA, use)
        calls = f'<[{self._token_id}]> " "? "[" ws {listed} ws "]"'
        start = f"start: {calls}" if use.mode == "required" else f"start: {text} | {calls}"
        return f"{start}\n{call_rules(use)}"
