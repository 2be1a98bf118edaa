"""Calls as Nous Research's Hermes and other ChatML models write them: JSON within ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mlx_mixtral.calls.definitions import Tool, ToolUse
from mlx_mixtral.calls.grammar import ANY_TEXT, call_rules, terminal
from mlx_mixtral.calls.markup import Delimiters, Markup, json_value
from mlx_mixtral.calls.turns import ToolCall
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["BEGIN", "END", "HermesCalls"]

BEGIN, END = "<tool_call>", "</tool_call>"
_FORM = f'{BEGIN}\n{{"name": "…", "arguments": {{…}}}}\n{END}'


class HermesCalls(Markup):
    """Text may stand before the calls. The tags are text, or control tokens where the vocabulary has such."""

    name = "hermes"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._begin_id, self._end_id = _hidden(tokenizer, BEGIN), _hidden(tokenizer, END)
        self.delimiters = Delimiters(
            begin_id=self._begin_id,
            begin=() if self._begin_id is not None else (BEGIN,),
            is_list=False,
            end_id=self._end_id,
            end=() if self._end_id is not None else (END,),
        )

    def instructions(self, tools: Sequence[Tool]) -> str:
        listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
        return (
            f"You can call functions. These are their definitions:\n<tools>\n{listed}\n</tools>\n"
            f"To call one, write its name and arguments as JSON, each call between tags of its own:\n{_FORM}\n"
            "What it gives comes back between <tool_response> and </tool_response>. "
            "Call no function that is not listed, and none where you can answer without."
        )

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = [{"name": call.name, "arguments": json_value(call.arguments)} for call in calls]
        return "\n".join(f"{BEGIN}\n{json.dumps(each, ensure_ascii=False)}\n{END}" for each in written)

    def write_results(self, results: Sequence[tuple[ToolCall, str]]) -> str:
        written = [{"name": call.name, "content": json_value(text)} for call, text in results]
        return "\n".join(
            f"<tool_response>\n{json.dumps(each, ensure_ascii=False)}\n</tool_response>" for each in written
        )

    def rules(self, use: ToolUse, answer: str | None) -> str:
        begin = terminal(BEGIN) if self._begin_id is None else f"<[{self._begin_id}]>"
        end = terminal(END) if self._end_id is None else f"<[{self._end_id}]>"
        text = answer or ("TEXT" if self._begin_id is None else ANY_TEXT)
        text_rule = [f"TEXT: {ANY_TEXT} & ~/(?s:.*){BEGIN}(?s:.*)/"] if text == "TEXT" else []
        if use.mode == "none" or not use.callable_tools:
            return "\n".join([f"start: {text}", *text_rule])
        # A line for each: where calls may follow each other at once, a token that ends one and begins the next hides the end.
        more = "" if use.max_calls == 1 else f" (GAP {begin} rest){{0,{use.max_calls - 1}}}"
        calls = [f"rest: ws call ws {end}", "GAP: /\\n[ \\t\\n]{0,20}/", call_rules(use)]
        if use.mode == "required":
            return "\n".join([f"start: ws {begin} rest{more}", *calls])
        if answer is not None:
            begun = f"ws {begin}"
        elif self._begin_id is not None:
            begun = f"{ANY_TEXT} {begin}"
        else:
            begun = "until_call"
            calls.append(f"until_call[lazy]: /(?s:.*){BEGIN}/")
        return "\n".join([f"start: {text} | {begun} rest{more}", *text_rule, *calls])


def _hidden(tokenizer: Tokenizer, content: str) -> int | None:
    """The id of a tag that decodes to nothing."""
    token_id = tokenizer.special_id(content)
    return token_id if token_id is not None and tokenizer.surface(token_id) is None else None
