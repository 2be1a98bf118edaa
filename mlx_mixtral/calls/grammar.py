"""Grammars of answers with calls, in llguidance's variant of Lark's notation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.arguments import check_type
from mlx_mixtral.calls.definitions import MAX_DEFINITIONS_BYTES, Tool, ToolUse
from mlx_mixtral.constraints.grammar import WHITESPACE, check
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar, JsonObject, JsonSchema, Regex
from mlx_mixtral.errors import ConstraintError, InvalidRequestError

__all__ = [
    "ANY_TEXT",
    "COMMA",
    "WHITESPACE",
    "AnswerGrammar",
    "answer_rule",
    "call_rules",
    "refusal",
    "repeated",
    "terminal",
]

ANY_TEXT = "/(?s:.*)/"
COMMA = 'ws "," ws'


@dataclass(frozen=True)
class AnswerGrammar(Grammar):
    """A grammar made of checked parts, so that only their sum is bounded: a request may have a hundred tools."""

    is_shown = False
    is_loose = True
    parts: tuple[JsonSchema, ...] = ()

    @property
    def schemas(self) -> tuple[JsonSchema, ...]:
        return self.parts

    def __post_init__(self) -> None:
        check_type("lark", self.lark, str, "a grammar, as text")
        if len(self.lark) > 4 * MAX_DEFINITIONS_BYTES:
            raise InvalidRequestError("the schemas of the tools are too large together; leave some tools out")


def terminal(text: str) -> str:
    """A text as a rule names it."""
    return json.dumps(text, ensure_ascii=False)


def repeated(rule: str, separator: str, use: ToolUse) -> str:
    """One of ``rule``, or as many as the answer may have calls."""
    return rule if use.max_calls == 1 else f"{rule} ({separator} {rule}){{0,{use.max_calls - 1}}}"


def call_rules(use: ToolUse) -> str:
    """``call`` is a call of one of the tools that may be called, as JSON; ``ws`` is white space, or none."""
    tools = use.callable_tools
    lines = [
        f"ws: /({WHITESPACE})?/",
        f'call: "{{" ws {terminal(json.dumps("name"))} ws ":" ws ({_either("named", tools)}) ws "}}"',
    ]
    for number, tool in enumerate(tools):
        key, name = terminal(json.dumps("arguments")), terminal(json.dumps(tool.name))
        lines.append(f'named_{number}: {name} ws "," ws {key} ws ":" ws arguments_{number}')
        lines.append(f"arguments_{number}: {_json(tool.arguments_schema, is_strict=tool.strict)}")
    return "\n".join(lines)


def answer_rule(name: str, answer: ConstraintSpec, *, reserved_key: str = "") -> str:
    """A rule for text that keeps a constraint of its own; an object that does not list ``reserved_key`` itself has none."""
    if isinstance(answer, JsonObject):
        answer = JsonSchema({"type": "object"})
    if isinstance(answer, JsonSchema):
        document = answer.document
        if not isinstance(document, dict):
            return f"{name}: %json {json.dumps(document)}"
        properties = document.get("properties", {})
        is_plain = isinstance(properties, dict) and not any(
            key in document for key in ("$ref", "allOf", "anyOf", "oneOf")
        )
        if reserved_key and is_plain:
            document = document | {"properties": {reserved_key: False} | properties}
        return f'{name}: " "? {name}_json\n{name}_json: {_json(document, is_strict=answer.strict)}'
    if isinstance(answer, Regex):
        # A slash would end it, unless it is escaped already.
        pattern = re.sub(
            r"\\.|/", lambda match: match[0] if match[0] != "/" else r"\/", answer.pattern, flags=re.DOTALL
        )
        pattern = pattern.replace("\n", r"\n").replace("\r", r"\r")
        return f'{name}: " "? /{pattern}/'
    if isinstance(answer, Grammar):
        return f'{name}: " "? {name}_lark\n{name}_lark: %lark {{\n{answer.lark}\n}}'
    raise AssertionError(f"unknown constraint {answer!r}")


def refusal(tool: Tool) -> ConstraintError | None:
    """Why the schema of a tool's arguments cannot be kept; None where it can.

    Raises:
        MissingDependencyError: llguidance is not installed.
    """
    try:
        check(tool.arguments)
    except ConstraintError as error:
        return error
    return None


def _either(stem: str, tools: tuple[Tool, ...]) -> str:
    return " | ".join(f"{stem}_{number}" for number in range(len(tools)))


def _json(schema: dict[str, Any], *, is_strict: bool) -> str:
    options = {"whitespace_pattern": WHITESPACE, "lenient": not is_strict, "coerce_one_of": not is_strict}
    kept = {key: value for key, value in schema.items() if key != "x-guidance"}
    return f"%json {json.dumps(kept | {'x-guidance': options}, ensure_ascii=True)}"
