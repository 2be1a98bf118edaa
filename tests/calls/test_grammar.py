"""Grammars of answers: what llguidance lets a model write, and what is then read from it."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from mlx_mixtral.calls.chat import ChatPrompt, ToolChat
from mlx_mixtral.calls.definitions import MAX_CALLS, read_tools
from mlx_mixtral.calls.parser import TextDelta
from mlx_mixtral.constraints.base import is_allowed
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.matching import CompiledConstraint
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar, JsonObject, JsonSchema, Regex
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import ConstraintError
from mlx_mixtral.tokenizer import Tokenizer

from .support import ASK, CITY, TOOLS, tool

MARKER = 5  # [TOOL_CALLS] of v3
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "now", "arguments": {}}'
NAMED = {"type": "function", "function": {"name": "now"}}
WAYS = ["mistral", "hermes", "generic"]


@functools.cache
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(TokenTable(tokenizer), max_seconds=60)


def prompt(
    v3: Tokenizer, way: str, tools: Any = TOOLS, answer: ConstraintSpec | None = None, **said: Any
) -> ChatPrompt:
    return ToolChat(v3, way).prompt([ASK], read_tools(tools, **said), answer)


def compiled(v3: Tokenizer, made: ChatPrompt) -> CompiledConstraint:
    assert made.constraint is not None
    return compiler(v3).compile(made.constraint, from_start=True)


def ids(v3: Tokenizer, way: str, *calls: str, text: str = "") -> list[int]:
    """An answer with calls as a model writes it."""
    before = v3.encode(text, bos=False) if text else []
    if not calls:
        return before
    if way == "mistral":
        return [*before, MARKER, *v3.encode(f"[{', '.join(calls)}]", bos=False)]
    if way == "generic":
        return v3.encode(f'{text}{{"tool_calls": [{", ".join(calls)}]}}', bos=False)
    return v3.encode(text + "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls), bos=False)


def is_taken(v3: Tokenizer, made: ChatPrompt, tokens: list[int]) -> bool:
    """Whether an answer may be these tokens, and end."""
    constraint = compiled(v3, made).begin(400)
    row = np.zeros(compiler(v3).vocabulary.words, np.int32)
    for token in tokens:
        if constraint.is_complete:
            return False
        constraint.mask_into(row)
        if not is_allowed(row, token) or constraint.accept(token) != token:
            return False
    constraint.mask_into(row)
    return constraint.is_complete or is_allowed(row, 2)


@pytest.mark.parametrize("way", WAYS)
def test_auto_is_text_or_calls(v3: Tokenizer, way: str) -> None:
    made = prompt(v3, way)
    for text in ("Hello {there} <b>", '{"a": [1]}', "[1, 2]", "x"):
        assert is_taken(v3, made, ids(v3, way, text=text)), text
    assert is_taken(v3, made, ids(v3, way, PARIS))
    assert is_taken(v3, made, ids(v3, way, PARIS, NOW))
    assert is_taken(v3, made, ids(v3, way, PARIS, text="One moment.\n")) == (way != "mistral")


WRONG = [
    '{"name": "get_weather", "arguments": {"town": "Paris"}}',
    '{"name": "get_weather", "arguments": {}}',
    '{"name": "get_weather", "arguments": {"city": 3}}',
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    '{"name": "nobody", "arguments": {}}',
    '{"name": "now", "arguments": {"city": "Paris"}}',
    '{"name": "now"}',
    '{"name": "now", "arguments": "{}"}',
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", WRONG)
def test_calls_keep_to_the_schemas(v3: Tokenizer, way: str, wrong: str) -> None:
    for said in ({}, {"tool_choice": "required"}):
        made = prompt(v3, way, **said)
        assert not is_taken(v3, made, ids(v3, way, wrong))
        assert not is_taken(v3, made, ids(v3, way, PARIS, wrong))


@pytest.mark.parametrize("way", WAYS)
def test_a_choice_is_kept(v3: Tokenizer, way: str) -> None:
    taken = {
        "required": (prompt(v3, way, tool_choice="required"), [False, True, True, True]),
        "named": (prompt(v3, way, tool_choice=NAMED), [False, False, True, False]),
        "none": (prompt(v3, way, tool_choice="none"), [True, False, False, False]),
        "one": (prompt(v3, way, parallel_tool_calls=False), [True, True, True, False]),
    }
    answers = [ids(v3, way, text="Hello"), ids(v3, way, PARIS), ids(v3, way, NOW), ids(v3, way, PARIS, NOW)]
    for name, (made, wanted) in taken.items():
        assert [is_taken(v3, made, answer) for answer in answers] == wanted, name
    most = prompt(v3, way, tool_choice="required")
    assert not is_taken(v3, most, ids(v3, way, *[NOW] * (MAX_CALLS + 1)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (JsonSchema({"properties": {"a": {"type": "integer"}}, "required": ["a"]}), '{"a": 3}', '{"a": "x"}'),
        (JsonObject(), '{"a": 3}', "[3]"),
        (Regex("[a-z]+/\n\\/[0-9]{2}"), "ab/\n/12", "ab/12"),
        (Grammar('start: "yes" | "no"'), "yes", "maybe"),
    ],
)
def test_text_keeps_its_own_format_beside_tools(
    v3: Tokenizer, way: str, answer: ConstraintSpec, right: str, wrong: str
) -> None:
    for said, calls_too in (({}, True), ({"tool_choice": "none"}, False)):
        made = prompt(v3, way, answer=answer, **said)
        assert is_taken(v3, made, ids(v3, way, text=right))
        assert not is_taken(v3, made, ids(v3, way, text=wrong))
        # Where none may be called, what a call is to others is an object like any.
        is_object = way == "generic" and isinstance(answer, JsonObject)
        assert is_taken(v3, made, ids(v3, way, PARIS)) == (calls_too or is_object)
        assert not calls_too or not is_taken(v3, made, ids(v3, way, WRONG[0]))
    forced = prompt(v3, way, answer=answer, tool_choice="required")
    assert not is_taken(v3, forced, ids(v3, way, text=right))
    assert is_taken(v3, forced, ids(v3, way, PARIS))


MANY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "when": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "count": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
    },
    "required": ["when", "place", "count"],
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}


def drawn(v3: Tokenizer, made: ChatPrompt, max_tokens: int, chance: random.Random) -> Iterator[int]:
    """An answer of a model that knows nothing: any token that may come, those of its own markup now and then."""
    constraint = compiled(v3, made).begin(max_tokens)
    row = np.zeros(compiler(v3).vocabulary.words, np.int32)
    for _ in range(max_tokens):
        if constraint.is_complete:
            return
        constraint.mask_into(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        token = constraint.accept(int(chance.choice(allowed.tolist())))
        if token == 2:
            return
        yield token


@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_drawn_is_read_as_calls_that_validate(v3: Tokenizer, way: str) -> None:
    tools = [*TOOLS, tool("many", MANY)]
    schemas = {each.name: each.arguments_schema for each in read_tools(tools).tools}
    chance = random.Random(way)
    for max_tokens in (60, 90, 300):
        for _ in range(2):
            made = prompt(v3, way, tools, tool_choice="required")
            parser, decoder = made.parser(), v3.streaming_decoder()
            events = []
            for token in drawn(v3, made, max_tokens, chance):
                events += parser.add(decoder.add(token), token)
            events += parser.add(decoder.finish()) + parser.finish(was_cut=False)
            assert not [event for event in events if isinstance(event, TextDelta)]
            assert parser.calls
            for each in parser.calls:
                jsonschema.validate(json.loads(each.arguments), schemas[each.name])


def test_a_schema_that_cannot_be_kept_names_its_tool(v3: Tokenizer) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for tools, place in (
        (
            [*TOOLS, tool("odd", odd, strict=True)],
            r"^tools\[2\]\.function\.parameters: .*cannot be kept: .*uniqueItems",
        ),
        ([tool("never", {"properties": {"a": False}, "required": ["a"]})], r"^tools\[0\]\.function\.parameters: "),
    ):
        made = prompt(v3, "mistral", tools)
        with pytest.raises(ConstraintError) as caught:
            compiled(v3, made)
        explained = made.explained(caught.value)
        assert explained is not caught.value
        with pytest.raises(type(explained), match=place):
            raise explained
    lenient = ids(v3, "mistral", '{"name": "odd", "arguments": {"a": [1, 1]}}')
    assert is_taken(v3, prompt(v3, "mistral", [tool("odd", odd)]), lenient)


def test_a_hundred_tools_are_one_grammar(v3: Tokenizer) -> None:
    many = [tool(f"tool_{number}", CITY, description="x" * 900) for number in range(100)]
    made = prompt(v3, "mistral", many)
    assert is_taken(v3, made, ids(v3, "mistral", '{"name": "tool_99", "arguments": {"city": "Rome"}}'))
    assert not is_taken(v3, made, ids(v3, "mistral", '{"name": "tool_100", "arguments": {"city": "Rome"}}'))
