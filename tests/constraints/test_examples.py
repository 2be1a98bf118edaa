"""Examples of patterns against ``re``."""

from __future__ import annotations

import re

import pytest

from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.examples import FORMATS, examples, shortest_match
from mlx_mixtral.constraints.specs import JsonSchema, Regex

PATTERNS = [
    "abc", "a|bc|", "(foo|ba+r){2,3}", "[^a-z]+x", r"[\d_]{4}\s\w", r".*[0-9]{3}", r"^\S+@\S+\.[a-z]{2,}$", r"[^\W\d]{3}",
    "(?:x|y)*?z", r"\\\"", "[^0-9A-Za-z]", "(?i)Ab?c", r"[\D]", "é{3}", "", r"[-+]?\d+(\.\d+)?",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_example_matches_its_pattern(pattern: str) -> None:
    found = shortest_match(pattern)
    assert found is not None
    assert re.fullmatch(pattern, found)


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", r"(a)\1", "a{9000}", "(" * 3000 + ")" * 3000])
def test_what_has_no_example_is_no_error(pattern: str) -> None:
    found = shortest_match(pattern)
    assert found is None or re.fullmatch(pattern, found)


def test_pythons_own_plans_for_a_syntax_are_not_told() -> None:
    assert shortest_match("[[a]") == "["


def test_a_schemas_examples_are_long_enough_and_escaped() -> None:
    schema = {"items": {"type": "string", "pattern": '"x[0-9]', "minLength": 6}}
    assert set(examples(JsonSchema(schema))) == {'\\"x0aaa', 'aaa\\"x0'}
    assert examples(Regex("a+")) == ["a"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_example_is_one(compiler: Compiler, name: str) -> None:
    constraint = compiler.compile(JsonSchema({"type": "string", "format": name}, strict=True)).begin(200)
    for token in compiler.vocabulary.table.tokenize_str(f'"{FORMATS[name]}"'):
        assert constraint.accept(token) == token
    assert constraint.is_complete
