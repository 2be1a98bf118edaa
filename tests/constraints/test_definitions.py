"""Definitions: what is taken, what is refused and how it is said; compilations that hang, and those that are kept."""

from __future__ import annotations

import json
import random
import sys
import threading
from types import MappingProxyType
from typing import Any

import pydantic
import pytest

from mlx_mixtral.constraints import compiler as compiling
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.grammar import check
from mlx_mixtral.constraints.matching import CompiledConstraint
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar, JsonObject, JsonSchema, Regex
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import BusyError, ConstraintError, InvalidRequestError, MissingDependencyError

from .support import allowed_ids

CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


class City(pydantic.BaseModel):
    name: str
    people: int | None = None


def test_a_schema_is_a_mapping_text_or_a_pydantic_model() -> None:
    assert JsonSchema(MappingProxyType(CITY)).document == JsonSchema(json.dumps(CITY)).document == CITY
    assert JsonSchema(City).document == City.model_json_schema()
    assert JsonSchema("true").document is True


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


SIMPLE = {"type": "string"}
REFUSED: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[1]", "a JSON list"),
    (float("nan"), "mapping, JSON text"),
    ('{"minimum": NaN}', "holds NaN"),
    ({"a": {1, 2}}, "not JSON: it holds a set"),
    (int, "the class int"),
    ("", "is empty"),
    ('"\ud800"', "lone surrogate"),
    ({"title": "x" * 64_000}, r"has 640\d\d bytes; at most 64000"),
    (nested(50), "more than 50 levels"),
    (nested(5000), "more than 50 levels|recursion"),
    ('{"items":' * 5000 + "{}" + "}" * 5000, "more than 50 levels"),
    ({"properties": {str(n): {} for n in range(513)}}, "has 513 properties; at most 512"),
    ({"enum": list(range(4097))}, "has 4097 enum values; at most 4096"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "match 2 patterns at once"),
    ({"pattern": "a", "$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"pattern": "b"}, SIMPLE]}}}, "match 2 patterns"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_a_schema_beyond_the_limits_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        JsonSchema(schema)


def test_a_schema_at_the_limits_is_taken() -> None:
    JsonSchema(nested(24))
    JsonSchema({"properties": {str(n): {} for n in range(512)}})
    JsonSchema({"enum": list(range(4096))})
    JsonSchema({"anyOf": [{"pattern": "a"}, {"pattern": "b"}]})
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}
    JsonSchema(loop)


UNKNOWN: list[tuple[ConstraintSpec, str]] = [
    (JsonSchema({"type": "array", "uniqueItems": True}, strict=True), "uniqueItems.*strict=False"),
    (JsonSchema({"type": "string", "format": "odd"}, strict=True), "Unknown format: odd"),
    (JsonSchema({"not": SIMPLE}, strict=True), "not"),
    (JsonSchema({"type": "text"}), "Invalid type: text"),
    (JsonSchema({"$ref": "https://example.org/s"}), "not present in a registry"),
    (JsonSchema(False), "schema is false"),
    (Regex("(?=a)b"), "look-ahead"),
    (Regex("("), "unclosed group"),
]


@pytest.mark.parametrize(("spec", "message"), UNKNOWN)
def test_what_cannot_be_kept_is_named(compiler: Compiler, spec: ConstraintSpec, message: str) -> None:
    with pytest.raises(ConstraintError, match=message) as refused:
        compiler.compile(spec)
    assert "^" not in str(refused.value)
    assert " | " not in str(refused.value)
    with pytest.raises(ConstraintError, match=message):
        check(spec)


def test_a_grammar_names_the_place_of_its_mistake(compiler: Compiler) -> None:
    with pytest.raises(ConstraintError, match=r'grammar cannot be kept: at 2\(4\): unknown name: "word"'):
        compiler.compile(Grammar("start: a\na: word"))


def test_what_a_lenient_schema_leaves_out_is_listed(compiler: Compiler) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "odd"}}
    assert sorted(compiler.compile(JsonSchema(schema)).warnings) == [
        'Unimplemented keys: ["uniqueItems"]',
        "Unknown format: odd",
    ]
    assert compiler.compile(JsonSchema(CITY)).warnings == ()


def test_a_schemas_own_options_do_not_count(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(JsonSchema({"x-guidance": {"whitespace_flexible": False}, **CITY})).begin(50)
    for piece in (b"{", b"\n", b'"'):
        token = table.tokens.index(piece)
        assert constraint.accept(token) == token


def _doubling(kind: str) -> JsonSchema:
    """Each definition uses the one before it twice."""
    definitions: dict[str, Any] = {"d0": SIMPLE}
    for n in range(1, 25):
        below = {"$ref": f"#/$defs/d{n - 1}"}
        pair = {"type": "object", "properties": {"p": below, "q": below}, "required": ["p", "q"]}
        definitions[f"d{n}"] = pair if kind == "properties" else {"allOf": [below, below]}
    return JsonSchema({"$ref": "#/$defs/d24", "$defs": definitions})


BOMBS: list[ConstraintSpec] = [
    Regex("((((a{1,100}){1,100}){1,100}){1,100})"),
    Regex("(.*a){40}.{200}(b|c.*)*"),
    Regex("(x?){3000}x{3000}"),
    JsonSchema({"type": "string", "minLength": 10**9}),
    JsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    JsonSchema({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}),
    JsonSchema({"type": "string", "pattern": "^(a|b|ab)*(.*x){15}.{30}$"}),
    _doubling("properties"),
    _doubling("allOf"),
    Grammar('start: "a"{1,1000000}'),
    Grammar('start: a a\na: b b b\nb: c c c\nc: "x"{0,999}'),
]


@pytest.mark.parametrize("spec", BOMBS)
def test_a_bomb_is_refused_or_harmless(compiler: Compiler, table: TokenTable, spec: ConstraintSpec) -> None:
    chance = random.Random(2)
    try:
        constraint = compiler.compile(spec).begin(300)
        for _ in range(20):
            if constraint.is_complete:
                break
            constraint.accept(int(chance.choice(allowed_ids(constraint, table.size))))
    except ConstraintError:
        return


def test_compiled_grammars_are_kept_up_to_a_number(table: TokenTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_COMPILED", 2)
    own = Compiler(table)
    first = own.compile(Regex("a"))
    own.compile(Regex("b"))
    assert own.compile(Regex("a")) is first
    own.compile(Regex("c"))
    assert own.compile(Regex("a")) is first
    assert own.compile(Regex("a"), from_start=True) is not first
    assert own.compile(JsonObject()) is own.compile(JsonObject(), from_start=True)
    assert own.compile(Regex("a")) is not first


def test_a_hanging_compilation_is_left_and_two_refuse_others(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, goes_on, ended = Compiler(table, max_seconds=0.05), threading.Event(), threading.Semaphore(0)
    compiled = own._compiled

    def hanging(text: str, spec: ConstraintSpec) -> CompiledConstraint:
        if spec != Regex("quick"):
            goes_on.wait(60)
        ended.release()
        return compiled(text, spec)

    monkeypatch.setattr(own, "_compiled", hanging)
    for pattern in ("one", "two"):
        with pytest.raises(ConstraintError, match=r"more than 0\.05 s to compile"):
            own.compile(Regex(pattern))
    with pytest.raises(BusyError, match="2 earlier constraints"):
        own.compile(Regex("quick"))
    goes_on.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "mlx-mixtral-constraint"]:
        thread.join(60)
    monkeypatch.setattr(own, "_max_seconds", 60)
    assert own.compile(Regex("quick")).min_tokens


def test_something_else_is_no_constraint(compiler: Compiler) -> None:
    with pytest.raises(InvalidRequestError, match="must be JsonSchema, Regex, Grammar or JsonObject"):
        compiler.compile("a+")  # type: ignore[arg-type]


def test_without_llguidance_the_extra_is_named(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"mlx-mixtral\[constraints\]"):
        check(JsonObject())
