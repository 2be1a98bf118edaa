"""Answers that have to be something: schemas, regular expressions, choices; and calls of tools, whole and streamed."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import Running

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Tell me of a city."}]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Finds a city.", "parameters": CITY}}


def _as_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}


def _asked(server: Running, **fields: Any) -> Any:
    reply = server.post(CHAT, {"messages": ASK, "max_tokens": 80, "temperature": 1, "seed": 2} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": _as_format(CITY)},
        {"response_format": {"type": "json_object", "schema": CITY}},
        {"guided_json": CITY},
        {"structured_outputs": {"json": CITY}},
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_keeps_its_schema(server: Running, fields: dict[str, Any], temperature: float) -> None:
    choice = _asked(server, **fields, temperature=temperature)
    jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


def test_every_one_of_several_answers_keeps_it(server: Running) -> None:
    reply = server.chat(ASK, response_format=_as_format(CITY), n=4, temperature=1, max_tokens=80)
    for choice in reply["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


def test_json_is_whole_where_max_tokens_cut_it(server: Running) -> None:
    choice = _asked(server, response_format={"type": "json_object"}, max_tokens=12)
    assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"structured_outputs": {"regex": "x{2,4}y"}}, "x{2,4}y"),
        ({"guided_choice": ["yes", "no", 'say "so"']}, 'yes|no|say "so"'),
        ({"guided_grammar": 'start: "a" B\nB: /b{2}/'}, "abb"),
    ],
)
def test_an_answer_keeps_its_expression(server: Running, fields: dict[str, Any], pattern: str) -> None:
    choice = _asked(server, **fields)
    assert re.fullmatch(pattern, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    completion = server.post("/v1/completions", {"prompt": "So:", "max_tokens": 40, **fields}).json()
    assert re.fullmatch(pattern, completion["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": CITY}, "json_schema"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}}, "response_format.schema"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_not_passed_over(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    reply = server.post(CHAT, {"messages": ASK, "max_tokens": 8, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_stream_keeps_it_too(server: Running) -> None:
    body = {"messages": ASK, "max_tokens": 80, "temperature": 1, "seed": 2, "response_format": _as_format(CITY)}
    events = server.events(CHAT, body)
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert text == _asked(server, response_format=_as_format(CITY))["message"]["content"]


def test_a_keyword_that_cannot_be_kept_is_told_or_refused(server: Running) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9}, "uniqueItems": True, "maxItems": 3}
    reply = server.post(CHAT, {"messages": ASK, "max_tokens": 30, "response_format": _as_format(schema)})
    assert "uniqueItems" in str(reply.json()["warnings"])
    strict = _as_format(schema)
    strict["json_schema"]["strict"] = True
    refused = server.post(CHAT, {"messages": ASK, "max_tokens": 30, "response_format": strict})
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_that_is_required_is_made(server: Running, choice: Any) -> None:
    body = {"messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 300, "parallel_tool_calls": False}
    reply = server.post(CHAT, body | {"seed": 1})
    assert reply.status_code == 200, reply.text
    read = ChatCompletion.model_validate(reply.json(), strict=True).choices[0]
    assert read.finish_reason == "tool_calls"
    assert read.message.tool_calls is not None
    for call in read.message.tool_calls:
        assert call.type == "function"
        assert call.function.name == "look_up"
        assert re.fullmatch("[A-Za-z0-9]{9}", call.id)
        jsonschema.validate(json.loads(call.function.arguments), CITY)


def test_a_streamed_call_is_the_plain_one(server: Running) -> None:
    body = {
        "messages": ASK, "tools": [TOOL], "tool_choice": "required", "max_tokens": 300, "seed": 1, "parallel_tool_calls": False,
    }  # fmt: skip
    plain = server.post(CHAT, body).json()["choices"][0]
    events = server.events(CHAT, body)
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    expected = plain["message"]["tool_calls"][0]["function"]
    assert len(plain["message"]["tool_calls"]) == 1
    assert deltas[0].function is not None
    assert deltas[0].function.name == expected["name"]
    assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == expected["arguments"]
    assert chunks[-1].choices[0].finish_reason == plain["finish_reason"] == "tool_calls"


def test_a_result_is_answered(server: Running) -> None:
    call = {"id": "toolu_01XyZ", "type": "function", "function": {"name": "look_up", "arguments": '{"name": "Rome"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_01XyZ", "content": "2.8 million"},
    ]
    assert server.chat(messages, tools=[TOOL], tool_choice="none")["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_older_form_of_tools_is_answered_in_it(server: Running) -> None:
    body = {"messages": ASK, "functions": [TOOL["function"]], "function_call": {"name": "look_up"}, "max_tokens": 300}
    choice = server.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    jsonschema.validate(json.loads(choice["message"]["function_call"]["arguments"]), CITY)


def test_a_constraint_that_takes_too_long_to_compile_is_refused_and_others_go_on(server: Running) -> None:
    service = server.server.service
    before = service.compiler._max_seconds
    service.compiler._max_seconds = 0.0
    try:
        refused = server.post(CHAT, {"messages": ASK, "max_tokens": 20, "guided_regex": "(a|b|c){1,300}[d-z]{900}"})
        assert refused.status_code == 400
        assert "compile" in refused.json()["error"]["message"]
    finally:
        service.compiler._max_seconds = before
    assert server.chat(ASK, max_tokens=1)["choices"]
