"""Masks against brute force: whether the bytes of each token of the vocabulary keep the text a beginning of a right one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import regex

from mlx_mixtral.constraints.base import ALL_ALLOWED, is_allowed, mask_words, masks_along
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.specs import Grammar, JsonSchema, Regex
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import ConstraintError
from mlx_mixtral.tokenizer import Tokenizer

from .support import allowed_ids, drawn_text

SPACE = rb"(?: |\n[ \t]{0,20})?"
PARTIAL = {
    "regex": (Regex(r"[a-c]+(foo|ba+r){1,3}[0-9]{2,}"), rb"[a-c]+(foo|ba+r){1,3}[0-9]{2,}"),
    "alternatives": (Regex(r"(red|reddish|blue) (hat|hats)?"), rb"(red|reddish|blue) (hat|hats)?"),
    "grammar": (Grammar('start: "a" item ("," item)*\nitem: /[0-9]{1,3}/ | "x"'), rb"a([0-9]{1,3}|x)(,([0-9]{1,3}|x))*"),
    "schema": (
        JsonSchema(
            {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "n": {"enum": [1, 12, "one"]}},
                "required": ["on", "n"],
                "additionalProperties": False,
            }
        ),
        b" ?"
        + SPACE.join([rb"\{", b'"on"', b":", b"(true|false)", b",", b'"n"', b":", rb'(1|12|"one")', rb"\}"]),
    ),
}  # fmt: skip


def _begins(expression: regex.Pattern[bytes], data: bytes) -> bool:
    return expression.fullmatch(data, partial=True) is not None


@pytest.mark.parametrize("name", PARTIAL)
def test_a_token_is_allowed_where_the_text_with_it_begins_a_right_one(
    name: str, compiler: Compiler, table: TokenTable
) -> None:
    spec, pattern = PARTIAL[name]
    expression = regex.compile(pattern)
    chance = random.Random(5)
    constraint, text = compiler.compile(spec).begin(10_000), b""
    for _ in range(20):
        allowed = set(allowed_ids(constraint, table.size).tolist())
        expected = {
            token
            for token, data in enumerate(table.tokens)
            if data and not data.startswith(b"\xff") and _begins(expression, text + data)
        }
        if expression.fullmatch(text):
            expected |= table.eos_token_ids
        if constraint.is_complete:
            assert expected == table.eos_token_ids
            break
        assert allowed == expected, text
        token = chance.choice(sorted(allowed - table.eos_token_ids))
        assert constraint.accept(token) == token
        text += table.tokens[token]
    assert len(text) > 3


def test_characters_of_several_bytes_come_whole(compiler: Compiler, table: TokenTable) -> None:
    compiled = compiler.compile(Regex("[à-ü€😀]{5}"))
    for seed in range(20):
        _, text = drawn_text(compiled.begin(100), table, seed, 100)
        assert regex.fullmatch("[à-ü€😀]{5}", text)


def test_other_tokens_than_text_never_come(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(Regex("(?s:.*)")).begin(50)
    allowed = set(allowed_ids(constraint, table.size).tolist())
    assert not allowed & {0, 1}
    assert allowed >= {*table.eos_token_ids, *range(3 + 0x20, 3 + 0x7F)}


def test_a_text_that_may_go_on_may_also_end(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(Regex("a+")).begin(50)
    a, end = table.tokens.index(b"a"), next(iter(table.eos_token_ids))
    assert end not in allowed_ids(constraint, table.size)
    constraint.accept(a)
    assert {a, end} <= set(allowed_ids(constraint, table.size).tolist())
    assert not constraint.is_complete
    assert constraint.accept(end) == end
    assert constraint.is_complete
    assert not constraint.was_cut


def test_a_fork_goes_its_own_way(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(Regex("(ab|cd)e*")).begin(50)
    before = allowed_ids(constraint, table.size).tolist()
    fork = constraint.fork()
    for data in (b"c", b"d", b"e"):
        fork.accept(table.tokens.index(data))
    assert allowed_ids(constraint, table.size).tolist() == before
    assert allowed_ids(fork, table.size).tolist() != before
    constraint.accept(table.tokens.index(b"a"))
    assert not {table.tokens.index(b"e")} & set(allowed_ids(constraint, table.size).tolist())


def test_masks_along_proposals_are_those_of_each_place(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(Regex("(ab|cd)e{3}")).begin(50)
    a, b, c, e = (table.tokens.index(data) for data in (b"a", b"b", b"c", b"e"))
    rows = np.zeros((4, mask_words(table.size)), np.int32)
    masks_along(constraint, [a, b, e], rows)
    walked = constraint.fork()
    for row, token in zip(rows, (a, b, e, None), strict=True):
        expected = allowed_ids(walked, table.size)
        assert [token for token in range(table.size) if is_allowed(row, token)] == expected.tolist()
        if token is not None:
            walked.accept(token)
    masks_along(constraint, [a, c, e], rows)
    assert not is_allowed(rows[1], c)
    assert (rows[2:] == ALL_ALLOWED).all()


def test_a_token_that_is_not_allowed_is_an_error(compiler: Compiler, table: TokenTable) -> None:
    constraint = compiler.compile(Regex("ab")).begin(9)
    with pytest.raises(ConstraintError, match="cannot follow"):
        constraint.accept(table.tokens.index(b"x"))
    for data in (b"a", b"b"):
        constraint.accept(table.tokens.index(data))
    assert constraint.is_complete
    with pytest.raises(ConstraintError, match="after the end"):
        constraint.accept(table.tokens.index(b"a"))


def test_what_a_model_has_beyond_the_vocabulary_never_comes(tokenizer: Tokenizer) -> None:
    wide = TokenTable(tokenizer, tokenizer.vocab_size + 70)
    constraint = Compiler(wide).compile(Regex("(?s:.)*")).begin(9)
    assert allowed_ids(constraint, wide.size).max() < tokenizer.vocab_size
