"""``--json-schema``, ``--json-object``, ``--regex`` and ``--grammar``: texts that keep them, and refusals in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from .conftest import Invoke, assert_one_error

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_a_schema_is_text_or_a_file(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    texts = []
    for given in (json.dumps(SCHEMA), file):
        result = invoke("generate", short, "-p", "A name:", "-n", 30, "--json-schema", given)
        jsonschema.validate(json.loads(result.stdout), SCHEMA)
        texts.append(result.stdout)
    assert texts[0] == texts[1]


def test_every_option_keeps_its_form(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    assert re.fullmatch("[0-9]{4}\n", invoke("generate", short, "-p", "Year:", "--regex", "[0-9]{4}").stdout)
    assert isinstance(json.loads(invoke("generate", short, "-p", "x", "-n", 20, "--json-object").stdout), dict)
    grammar = 'start: "right" | "wrong"'
    (tmp_path / "answer.lark").write_text(grammar)
    for given in (grammar, tmp_path / "answer.lark"):
        assert invoke("generate", short, "-p", "x", "--grammar", given).stdout in ("right\n", "wrong\n")


def test_what_is_not_kept_is_a_warning(invoke: Invoke, short: Path) -> None:
    schema = '{"type": "array", "uniqueItems": true}'
    result = invoke("generate", short, "-p", "x", "-n", 20, "--json-schema", schema, "--json")
    assert 'warning: Unimplemented keys: ["uniqueItems"]' in result.stderr
    assert json.loads(result.stdout)["stats"]["warnings"] == ['Unimplemented keys: ["uniqueItems"]']


def test_chat_answers_keep_it(invoke: Invoke, short: Path) -> None:
    result = invoke("chat", short, "--chat-template", "chatml", "-n", 20, "--regex", "(yes|no)", input="Well?\nAnd?\n")
    assert set(result.stdout.split()) <= {"yes", "no"}
    assert len(result.stdout.split()) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--json-schema", "nowhere.json"), ("nowhere.json cannot be read",)),
        (("--json-schema", '{"type":'), ("the schema is not JSON",)),
        (("--json-schema", '{"type": "text"}'), ("Invalid type: text",)),
        (("--regex", "(?=a)"), ("look-ahead",)),
        (("--grammar", "start: word"), ("unknown name",)),
        (("--json-schema", json.dumps(SCHEMA), "-n", "2"), ("--max-tokens is 2", "allow more")),
    ],
)
def test_a_refusal_is_one_line(invoke: Invoke, short: Path, flags: tuple[str, ...], said: tuple[str, ...]) -> None:
    assert_one_error(invoke("generate", short, "-p", "x", *flags), *said)


def test_two_constraints_are_a_usage_error(invoke: Invoke) -> None:
    result = invoke("generate", "nowhere", "-p", "x", "--json-object", "--regex", "a")
    assert result.exit_code == 2
    assert "--json-object and --regex are two constraints; give one" in result.stderr


def test_a_file_that_is_too_large_or_no_text_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * 64_001)
    (tmp_path / "bytes").write_bytes(b"\xfe")
    assert_one_error(invoke("generate", "nowhere", "-p", "x", "--json-schema", tmp_path / "large"), "64001 bytes")
    assert_one_error(invoke("generate", "nowhere", "-p", "x", "--grammar", tmp_path / "bytes"), "not UTF-8")
