"""What comes out is whole: against ``jsonschema`` and ``re``, drawn evenly from the masks and by the bundled model."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from mlx_mixtral import JsonObject, JsonSchema, Mixtral, Regex, SamplingParams
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import ConstraintError

from .support import allowed_ids, drawn_text, make_schema

ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3},
        "size": {"anyOf": [{"type": "object", "properties": {"w": {"type": "number"}}, "required": ["w"]}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1},
        "rest": {"$ref": "#"},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}  # fmt: skip


def _judge(spec: ConstraintSpec, text: str) -> None:
    if isinstance(spec, Regex):
        assert re.fullmatch(spec.pattern, text)
    elif isinstance(spec, Grammar):
        assert eval(text, {"__builtins__": {}}) in (True, False)
    else:
        jsonschema.validate(json.loads(text), spec.document if isinstance(spec, JsonSchema) else {"type": "object"})


@pytest.mark.parametrize("seed", range(40))
def test_texts_of_a_schema_made_at_random_validate(compiler: Compiler, table: TokenTable, seed: int) -> None:
    spec = JsonSchema(make_schema(seed), strict=True)
    compiled = compiler.compile(spec)
    assert compiled.min_tokens is not None
    for extra in (0, 1, 7, 40, 200):
        limit = compiled.min_tokens + extra
        constraint = compiled.begin(limit)
        tokens, text = drawn_text(constraint, table, seed + extra, limit)
        assert len(tokens) <= limit
        _judge(spec, text)


SPECS = (
    JsonSchema(ORDER),
    JsonObject(),
    Regex(r"(foo|ba+r){2,4}x*-[a-z]{0,30}!"),
    Grammar('start: sum\nsum: term ("and " term)*\nterm: "True " | "(" sum ")" | "not " term'),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_text_is_whole_at_every_max_tokens(compiler: Compiler, table: TokenTable, spec: ConstraintSpec) -> None:
    compiled = compiler.compile(spec)
    assert compiled.min_tokens is not None
    cuts = 0
    for limit in range(compiled.min_tokens, compiled.min_tokens + 60):
        constraint = compiled.begin(limit)
        tokens, text = drawn_text(constraint, table, limit, limit)
        assert len(tokens) <= limit
        _judge(spec, text)
        cuts += constraint.was_cut
    assert cuts > 10


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_no_token_is_replaced_where_the_text_fits(compiler: Compiler, table: TokenTable, spec: ConstraintSpec) -> None:
    # The tokens of a text that had room, under a limit of as many: the last of them must not be taken for too late.
    compiled = compiler.compile(spec)
    for seed in range(4):
        free = compiled.begin(100_000)
        tokens, _ = drawn_text(free, table, seed, 400)
        if not free.is_complete:
            continue
        limit = len([token for token in tokens if token not in table.eos_token_ids])
        tight = compiled.begin(limit)
        replaced = [token for token in tokens if tight.accept(token) != token]
        assert not replaced
        assert not tight.was_cut


def test_too_few_tokens_for_any_text_are_refused(compiler: Compiler) -> None:
    compiled = compiler.compile(JsonSchema(ORDER))
    assert compiled.min_tokens is not None
    with pytest.raises(ConstraintError, match=r"max_tokens is 4, and the shortest text found .* has \d+ tokens"):
        compiled.begin(4)
    with pytest.raises(ConstraintError, match="no text of at most 4096 tokens"):
        compiler.compile(JsonSchema({"type": "array", "items": {"type": "null"}, "minItems": 100_000})).begin(10**6)


def test_white_space_ends(compiler: Compiler, table: TokenTable) -> None:
    # A model that writes white space wherever it may: never more than a line break and 20 blanks at once.
    constraint = compiler.compile(JsonSchema(ORDER)).begin(2000)
    chance, text = random.Random(1), b""
    while not constraint.is_complete:
        allowed = [int(token) for token in allowed_ids(constraint, table.size)]
        blank = [token for token in allowed if not table.tokens[token].strip()]
        in_string = text.count(b'"') % 2
        token = chance.choice(blank if blank and not in_string else allowed)
        text += table.tokens[constraint.accept(token)]
    jsonschema.validate(json.loads(text), ORDER)
    between = re.sub(rb'"(?:\\.|[^"\\])*"', b"s", text)
    assert 10 < max(map(len, re.findall(rb"\s+", between))) <= 21


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_the_model_writes_validates(model: Mixtral, temperature: float) -> None:
    for seed in range(4):
        schema = make_schema(1000 + seed)
        sampling = SamplingParams(temperature=temperature, seed=seed)
        out = model.generate("As JSON:", constraint=JsonSchema(schema, strict=True), sampling=sampling, max_tokens=160)
        jsonschema.validate(json.loads(out.text), schema)
        assert out.finish_reason in ("stop", "length")
        assert not out.stats.warnings


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_the_model_writes_matches(model: Mixtral, temperature: float) -> None:
    for pattern in (r"\+[0-9]{6,12}", r"[A-Z][a-z]{2,8}, [A-Z]{2}", r"(yes|no)(, .{5,20})?"):
        sampling = SamplingParams(temperature=temperature, seed=3)
        out = model.generate("Answer:", constraint=Regex(pattern), sampling=sampling, max_tokens=40)
        assert re.fullmatch(pattern, out.text)
