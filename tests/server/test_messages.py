"""Anthropic's protocol: its shapes by the anthropic package's own types and client, and what it says by chat completions."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.server.conftest import Running, Serve

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Say something."}]
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "people": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "people"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {"name": "look_up", "description": "Finds a city.", "input_schema": CITY}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def _body(**fields: Any) -> dict[str, Any]:
    return {"messages": ASK, "max_tokens": 12, "temperature": 0} | fields


def _asked(server: Running, **fields: Any) -> Any:
    reply = server.post(PATH, _body(**fields))
    assert reply.status_code == 200, reply.text
    Message.model_validate(reply.json(), strict=True)
    return reply.json()


def _put_together(events: list[Any]) -> Any:
    """The message that a stream's events say, by the protocol's rules alone."""
    message = events[0]["message"]
    pieces: dict[int, str] = {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            pieces[event["index"]] = event["content_block"].get("text", "")
        elif event["type"] == "content_block_delta":
            pieces[event["index"]] += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
        elif event["type"] == "content_block_stop":
            block = message["content"][event["index"]]
            field, value = ("text", str) if block["type"] == "text" else ("input", json.loads)
            block[field] = value(pieces[event["index"]])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    return message


def test_an_answer_is_that_of_a_chat_completion(server: Running) -> None:
    found = _asked(server, system="Be short.")
    chat = server.chat([{"role": "system", "content": "Be short."}, *ASK], max_tokens=12)
    assert found["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "seed": 4, "max_tokens": 30},
        {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 100},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look_up"}, "max_tokens": 100},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
    ],
    ids=["greedy", "seed", "any", "tool", "none"],
)
def test_a_stream_says_what_the_plain_reply_says(server: Running, fields: dict[str, Any]) -> None:
    plain, events = _asked(server, **fields), server.named_events(PATH, _body(**fields))
    for event in events:
        EVENT.validate_python(event)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["stop_reason"] is None
    streamed = _put_together(events)
    calls = [block for message in (plain, streamed) for block in message["content"] if block["type"] == "tool_use"]
    for block in calls:
        block["id"] = "its own"
    assert streamed | {"id": "", "usage": {}} == plain | {"id": "", "usage": {}}
    # The second of the two finds the first one's prompt kept.
    assert sum(streamed["usage"].values()) == sum(plain["usage"].values())


def test_calls_keep_their_schema(server: Running) -> None:
    found = _asked(server, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=120, temperature=1, seed=3)
    calls = [block for block in found["content"] if block["type"] == "tool_use"]
    assert calls
    for call in calls:
        assert call["name"] == "look_up"
        jsonschema.validate(call["input"], CITY)
    choice = {"type": "any", "disable_parallel_tool_use": True}
    alone = _asked(server, tools=[TOOL], tool_choice=choice, max_tokens=200, temperature=1, seed=3)
    assert [block["type"] for block in alone["content"]] == ["tool_use"]
    assert alone["stop_reason"] == "tool_use"


def test_a_call_that_was_cut_is_none(server: Running) -> None:
    """A stop sequence may end an answer within a call."""
    fields = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 100, "stop_sequences": ["people"]}
    found = _asked(server, **fields)
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "people")
    assert found["content"] == [{"type": "text", "text": ""}]
    events = server.named_events(PATH, _body(**fields))
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "people"}


def test_stop_sequences_are_named(server: Running) -> None:
    whole = _asked(server, max_tokens=30)["content"][0]["text"]
    stop = whole[4:12]
    for found in (
        _asked(server, max_tokens=30, stop_sequences=["never said", stop]),
        _put_together(server.named_events(PATH, _body(max_tokens=30, stop_sequences=["never said", stop]))),
    ):
        assert found["content"] == [{"type": "text", "text": whole[: whole.index(stop)]}]
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


def test_the_end_of_a_turn_is_no_stop_sequence(server: Running) -> None:
    eos = server.model.tokenizer.eos_token_id
    found = _asked(server, logit_bias={str(eos): 100}, stop_sequences=["x"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    assert found["content"] == [{"type": "text", "text": ""}]


def test_a_full_context_is_told_apart_from_max_tokens(server: Running) -> None:
    words = "word " * 900
    most = server.server.service.served.context_tokens
    asked = [{"role": "user", "content": words}]
    used = server.post(COUNT, {"messages": asked}).json()["input_tokens"]
    asked[0]["content"] += "word " * (most - used - 12)
    found = _asked(server, messages=asked, max_tokens=1000)
    assert found["stop_reason"] == "model_context_window_exceeded"
    assert sum(found["usage"].values()) == most


def test_results_of_calls_are_given_to_the_model(server: Running) -> None:
    """Read into the same prompt as the chat messages that say the same."""
    text = {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "toolu_01A", "name": "look_up", "input": {"name": "Ulm", "people": 3}}
    result = {"type": "tool_result", "tool_use_id": "toolu_01A", "content": [{"type": "text", "text": "gone"}]}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    told = [
        *ASK,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, call]},
        {"role": "user", "content": [result | {"is_error": True}, text]},
    ]
    arguments = json.dumps(call["input"])
    function = {"id": "toolu_01A", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    as_chat = [
        *ASK,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [function]},
        {"role": "tool", "tool_call_id": "toolu_01A", "content": "Error: gone"},
        {"role": "user", "content": "And?"},
    ]
    described = {"name": "look_up", "description": "Finds a city.", "parameters": CITY}
    tools = [{"type": "function", "function": described}]
    tokens = server.post("/tokenize", {"messages": as_chat, "tools": tools}).json()["tokens"]
    counted = server.post(COUNT, {"messages": told, "tools": [TOOL]}).json()
    MessageTokensCount.model_validate(counted, strict=True)
    assert counted == {"input_tokens": len(tokens)}
    plain = server.chat(as_chat, max_tokens=12, tools=tools, tool_choice="none")
    answer = _asked(server, messages=told, tools=[TOOL], tool_choice={"type": "none"})
    assert answer["content"][0]["text"] == plain["choices"][0]["message"]["content"]


def test_an_answer_goes_on_from_the_assistants_text(server: Running) -> None:
    begun = [*ASK, {"role": "assistant", "content": "Once upon"}]
    assert (
        _asked(server, messages=begun)["content"][0]["text"]
        == (server.chat(begun, max_tokens=12)["choices"][0]["message"]["content"])
    )


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_keeps_its_schema(server: Running, field: str) -> None:
    described = {"type": "json_schema", "schema": CITY}
    value = described if field == "output_format" else {"format": described, "effort": "low"}
    found = _asked(server, **{field: value}, max_tokens=80, temperature=1)
    jsonschema.validate(json.loads(found["content"][0]["text"]), CITY)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [*ASK, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "a b", "input": {}}]}, *ASK], "system": "x"}, "messages[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tools": [{"name": "a", "input_schema": {"properties": {"b": {"pattern": "("}}}}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "output_config.format.schema"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    reply = server.post(PATH, _body(**fields))
    assert reply.status_code == 400, reply.text
    told = ErrorResponse.model_validate(reply.json(), strict=True)
    assert told.error.type == "invalid_request_error"
    assert reply.json()["error"]["param"] == param, reply.text
    assert told.error.message.startswith(param)
    assert told.request_id == reply.headers["request-id"]
    assert " 400 POST " in server.line_of(reply)


def test_a_longer_prompt_than_the_context_is_refused(server: Running) -> None:
    reply = server.post(PATH, _body(messages=[{"role": "user", "content": "word " * 4000}]))
    assert reply.status_code == 400
    assert "1024" in reply.json()["error"]["message"]


def test_versions_of_the_protocol(server: Running) -> None:
    for path in (PATH, COUNT):
        body = {"messages": ASK, "max_tokens": 1} if path == PATH else {"messages": ASK}
        assert server.post(path, body, headers={"anthropic-version": "2023-06-01"}).status_code == 200
        assert server.post(path, body, headers={"anthropic-version": "2026-10-21"}).status_code == 200
        reply = server.post(path, body, headers={"anthropic-version": "2023-01-01"})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "anthropic-version"


def test_other_errors_have_anthropics_envelope(server: Running) -> None:
    told = [
        (404, "not_found_error", server.post(PATH, _body(model="claude"))),
        (404, "not_found_error", server.post(f"{PATH}/batches", _body())),
        (405, "invalid_request_error", server.client.get(PATH)),
        (415, "invalid_request_error", server.client.post(PATH, content="x")),
        (413, None, server.post(PATH, _body(system="x" * 2_100_000))),
        (403, "permission_error", server.post(PATH, _body(), headers={"host": "evil.example"})),
    ]
    for status, kind, reply in told:
        assert reply.status_code == status, reply.text
        if kind is None:  # documented, and not among the package's types
            assert reply.json()["error"]["type"] == "request_too_large"
            continue
        assert ErrorResponse.model_validate(reply.json(), strict=True).error.type == kind


def test_a_failing_engine_is_an_event_of_its_own(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_mixtral.server.rows import EngineRows

    with serve() as server:
        step = EngineRows.step

        def failing(rows: EngineRows) -> None:
            monkeypatch.setattr(EngineRows, "step", step)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(EngineRows, "step", failing)
        events = server.named_events(PATH, _body())
        assert [event["type"] for event in events] == ["message_start", "error"]
        assert ErrorResponse.model_validate(events[-1], strict=True).error.type == "api_error"


def test_the_anthropic_package_reads_it_all(serve: Serve) -> None:
    """With its own header for the key."""
    with serve(api_keys=("secret",)) as server:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "messages": ASK}
        with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
            assert client.messages.count_tokens(model="tiny", messages=ASK).input_tokens > 0  # type: ignore[arg-type]
            whole = client.messages.create(**asked, extra_body={"seed": 2})
            with client.messages.stream(**asked, extra_body={"seed": 2}) as stream:
                text = "".join(stream.text_stream)
                final = stream.get_final_message()
            assert text == final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
            assert final.usage.output_tokens == whole.usage.output_tokens
            tools = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look_up"}}
            with client.messages.stream(**asked | tools | {"max_tokens": 200}) as stream:
                called = stream.get_final_message()
            assert called.stop_reason == "tool_use"
            jsonschema.validate(called.content[0].input, CITY)  # type: ignore[union-attr]
            with pytest.raises(anthropic.NotFoundError):
                client.messages.create(**asked | {"model": "claude"})
            with pytest.raises(anthropic.BadRequestError, match="temperature"):
                client.messages.create(**asked, extra_body={"temperature": -1})
        with (
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(**asked)
