"""The one validator of bodies: what it takes is what its own JSON schema takes, as the jsonschema package reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.server.app import PATHS
from mlx_mixtral.server.wire.chat import CHAT_BODY
from mlx_mixtral.server.wire.completions import COMPLETION_BODY
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.openapi import BODIES, describe
from mlx_mixtral.server.wire.tokens import DETOKENIZE_BODY

DESCRIPTION = describe([(method, path) for method, path, _ in PATHS])
LEAST = {
    "ChatCompletionRequest": {"messages": [{"role": "user", "content": "Hi"}]},
    "CompletionRequest": {"prompt": "Hi"},
    "MessagesRequest": {"messages": [{"role": "user", "content": "Hi"}]},
    "CountTokensRequest": {"messages": [{"role": "user", "content": "Hi"}]},
    "ResponsesRequest": {"input": "Hi"},
    "EmbeddingsRequest": {"input": "Hi"},
    "TokenizeRequest": {"prompt": "Hi"},
    "DetokenizeRequest": {"tokens": [1]},
}
FIELDS = [(table, field) for table in BODIES.values() for field in table.fields]
OF_EVERY_TYPE: list[Any] = [
    None, True, False, 0, 1, -1, 3.0, 0.5, -2.5, 10**30, 1e300, "", "text", "auto", [], [1], ["a"], [None], [[1]], [{}], {},
    {"type": "text"}, {"type": "function"}, {"a": 1}, {"name": "x"}, {"include_usage": "yes"}, [{"role": "user"}],
    [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}], {"1": 200}, {"1": 5}, [["a"], [1]], [1, "a"],
    {"type": "tool", "name": "x"}, {"type": "adaptive"}, [{"role": "assistant", "content": [{"type": "thinking"}]}],
    [{"role": "user", "content": [{"type": "tool_result"}]}], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    [{"type": "text", "text": "Hi"}], [{"name": "x", "input_schema": {}}], {"format": {"type": "json_schema", "schema": {}}},
    [{"type": "function_call_output"}], [{"type": "reasoning"}], {"format": {"type": "json_object"}},
    {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
]  # fmt: skip


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]}
    return jsonschema.Draft202012Validator(schema)


def _is_valid(table: BodyTable, body: Any) -> bool:
    return bool(_validator(table.name).is_valid(body))


def _refusal(table: BodyTable, body: Any) -> ApiError | None:
    try:
        table.read(body)
    except ApiError as error:
        return error
    return None


def _reads(table: BodyTable, body: Any) -> bool:
    refusal = _refusal(table, body)
    assert refusal is None or refusal.status == 400
    return refusal is None


@pytest.mark.parametrize(("table", "field"), FIELDS, ids=[f"{table.name}.{field.name}" for table, field in FIELDS])
def test_a_field_takes_what_its_schema_takes(table: BodyTable, field: BodyField) -> None:
    for value in OF_EVERY_TYPE:
        body = LEAST[table.name] | {field.name: value}
        assert _reads(table, body) == _is_valid(table, body), (field.name, value)


@pytest.mark.parametrize(("table", "field"), FIELDS, ids=[f"{table.name}.{field.name}" for table, field in FIELDS])
def test_a_refusal_names_the_field(table: BodyTable, field: BodyField) -> None:
    refusals = [_refusal(table, LEAST[table.name] | {field.name: value}) for value in OF_EVERY_TYPE]
    told = [refusal for refusal in refusals if refusal is not None]
    assert told or field.name == "metadata"
    for refusal in told:
        assert refusal.param is not None
        assert refusal.param.startswith(field.name), (refusal.param, field.name)
        assert refusal.message.startswith(refusal.param)
        assert len(refusal.message) < 700


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KNOWN = st.sampled_from([field.name for field in CHAT_BODY.fields])


@given(st.dictionaries(KNOWN, JSON, max_size=4))
@settings(max_examples=60, deadline=None)
def test_whatever_a_body_holds_it_is_read_or_refused(fields: dict[str, Any]) -> None:
    body = LEAST["ChatCompletionRequest"] | fields
    assert _reads(CHAT_BODY, body) == _is_valid(CHAT_BODY, body)


@pytest.mark.parametrize("body", [None, [], "text", 5, True])
def test_a_body_is_an_object(body: Any) -> None:
    with pytest.raises(ApiError, match="must be an object") as error:
        CHAT_BODY.read(body)
    assert error.value.param is None


def test_a_required_field_that_is_missing_is_named() -> None:
    with pytest.raises(ApiError, match="messages is missing") as error:
        CHAT_BODY.read({"model": "tiny"})
    assert error.value.param == "messages"


def test_a_place_deep_in_the_body_is_named() -> None:
    wrong = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": 5}]}]}
    with pytest.raises(ApiError) as error:
        CHAT_BODY.read(wrong)
    assert error.value.param == "messages[0].content[1].text"


def test_null_is_the_default() -> None:
    nulls = {field.name: None for field in COMPLETION_BODY.fields} | {"prompt": "Hi"}
    assert COMPLETION_BODY.read(nulls) == COMPLETION_BODY.read({"prompt": "Hi"})


@pytest.mark.parametrize(("name", "off"), [("best_of", 1), ("suffix", ""), ("store", False), ("min_tokens", 0)])
def test_an_unsupported_field_may_say_nothing(name: str, off: Any) -> None:
    COMPLETION_BODY.read({"prompt": "Hi", name: off})
    with pytest.raises(ApiError, match="not supported") as error:
        COMPLETION_BODY.read({"prompt": "Hi", name: "x"})
    assert error.value.param == name
    assert error.value.code == "unsupported_parameter"


def test_true_is_no_number_and_a_whole_float_is_an_integer() -> None:
    assert DETOKENIZE_BODY.read({"tokens": [1.0]})["tokens"] == [1]
    with pytest.raises(ApiError, match=r"tokens\[0\] is True"):
        DETOKENIZE_BODY.read({"tokens": [True]})


def _unsupported() -> Iterator[tuple[BodyTable, BodyField]]:
    yield from ((table, field) for table, field in FIELDS if field.kind is None)


def test_the_description_says_what_is_not_supported() -> None:
    for table, field in _unsupported():
        described = DESCRIPTION["components"]["schemas"][table.name]["properties"][field.name]
        assert described["description"].startswith("Not supported")


def test_the_description_is_json() -> None:
    assert json.loads(json.dumps(DESCRIPTION, allow_nan=False)) == DESCRIPTION
