"""Calls for models that were not trained on any, such as Mixtral 8x7B: JSON that the system prompt asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mlx_mixtral.calls.definitions import Tool, ToolUse
from mlx_mixtral.calls.grammar import ANY_TEXT, COMMA, WHITESPACE, call_rules, repeated, terminal
from mlx_mixtral.calls.markup import Delimiters, Markup, json_value
from mlx_mixtral.calls.turns import ToolCall

__all__ = ["GenericCalls"]

_KEY = '"tool_calls"'


class GenericCalls(Markup):
    """An answer is text, or an object with the list ``tool_calls`` and nothing else. Results are the user's turn."""

    name = "generic"
    delimiters = Delimiters(begin=("{", _KEY, ":"), end=("}",), anywhere=False)
    reserved_key = "tool_calls"
    has_tool_role = False

    def instructions(self, tools: Sequence[Tool]) -> str:
        listed = "\n".join(json.dumps(tool.definition["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You can call tools. These are their definitions:\n{listed}\n"
            "To call tools, answer with this JSON and nothing else, one entry for each call:\n"
            f'{{{_KEY}: [{{"name": "…", "arguments": {{…}}}}]}}\n'
            'What they give comes back as {"tool_results": […]}. '
            "Call no tool that is not listed. Where you can answer without a tool, answer in plain text."
        )

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = [{"name": call.name, "arguments": json_value(call.arguments)} for call in calls]
        return json.dumps({"tool_calls": written}, ensure_ascii=False)

    def write_results(self, results: Sequence[tuple[ToolCall, str]]) -> str:
        written = [{"name": call.name, "content": json_value(text)} for call, text in results]
        return json.dumps({"tool_results": written}, ensure_ascii=False)

    def rules(self, use: ToolUse, answer: str | None) -> str:
        text = answer or "TEXT"
        text_rule = [] if answer else [f"TEXT: {ANY_TEXT} & ~/\\s*\\{{\\s*{_KEY}(?s:.*)/"]
        if use.mode == "none" or not use.callable_tools:
            return "\n".join([f"start: {text}", *text_rule])
        calls = f'ws ":" ws "[" ws {repeated("call", COMMA, use)} ws "]" ws "}}"'
        begin = f'ws "{{" ws {terminal(_KEY)}'
        if use.mode == "required":
            return "\n".join([f"start: {begin} {calls}", call_rules(use)])
        if answer is not None:
            return "\n".join([f"start: {text} | {begin} {calls}", call_rules(use)])
        # One terminal, as text is: the longer of two is taken, and text goes on where "{" alone ends.
        head = f"head[lazy]: /({WHITESPACE})?\\{{({WHITESPACE})?{_KEY}/"
        return "\n".join([f"start: TEXT | head {calls}", *text_rule, head, call_rules(use)])
