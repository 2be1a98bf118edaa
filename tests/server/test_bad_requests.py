"""Requests that are wrong: the status, the field, one line of log, and a server that goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Running

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"   ", "is empty"),
        (b"{", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a": "\xc3"}', "is not UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "lone surrogate"),
        (b'{"\\udc00": 1}', "lone surrogate"),
        (b"[]", "must be an object"),
        (b"3", "must be an object"),
        (b"null", "must be an object"),
        (b"[" + b"[]," * 600_000 + b"[]]", "more than 500000 values"),
    ],
)
def test_a_body_that_is_no_json_object(server: Running, data: bytes, said: str) -> None:
    reply = server.client.post(CHAT, content=data, headers=JSON)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert said in error["message"]
    assert len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"
    assert " 400 POST " in server.line_of(reply)


def test_a_lone_surrogate_is_placed(server: Running) -> None:
    reply = server.client.post(
        CHAT, content=json.dumps({"messages": [{"role": "user", "content": "a\ud800"}]}), headers=JSON
    )
    assert reply.json()["error"]["param"] == "messages[0].content"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml", ""]
)
def test_other_content_types_are_415(server: Running, kind: str) -> None:
    """A form of another site can send those without asking first; JSON it cannot."""
    reply = server.client.post(CHAT, content=json.dumps({"messages": [USER]}), headers={"content-type": kind})
    assert reply.status_code == 415


def test_a_charset_may_stand_beside_the_content_type(server: Running) -> None:
    body = json.dumps({"messages": [USER], "max_tokens": 1})
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert server.client.post(CHAT, content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"seed": "abc"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, None),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"tools": "now"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "later"}}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"store": True}, "store"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"model": 5}, "model"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids[0]"),
    ],
)
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str | None) -> None:
    reply = server.post(CHAT, {"messages": [USER], "max_tokens": 1} | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    if param is not None:
        assert error["param"] == param, error
    assert error["param"] is not None
    assert set(error) == {"message", "type", "param", "code"}
    assert " 400 POST " in server.line_of(reply)


def test_a_prompt_longer_than_the_context_is_refused(server: Running) -> None:
    for stream in (False, True):
        reply = server.post(CHAT, {"messages": [{"role": "user", "content": "word " * 4000}], "stream": stream})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "1024" in reply.json()["error"]["message"]


def test_a_rejected_stream_is_no_stream(server: Running) -> None:
    """What can be refused is refused before the head is sent."""
    reply = server.post(CHAT, {"messages": [USER], "stream": True, "temperature": 9})
    assert reply.status_code == 400
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(600)}},
        {"enum": [f"value {n}" for n in range(5000)]},
        {"type": "string", "pattern": "(a|b)" * 20_000},
        {"allOf": [{"type": "string", "pattern": f"^[a-z]{{1,{n}}}$"} for n in range(2, 40)]},
    ],
    ids=["properties", "enum", "size", "patterns"],
)
def test_bombs_are_refused(server: Running, schema: dict[str, Any]) -> None:
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = server.post(CHAT, {"messages": [USER], "response_format": described, "max_tokens": 4})
    assert reply.status_code == 400, reply.text
    assert server.is_idle()
