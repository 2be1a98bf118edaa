"""The Responses API: its shapes by the openai package's own types and client, and what it says by chat completions."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.conftest import Running, Serve

PATH = "/v1/responses"
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "people": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "people"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "name": "look_up", "description": "Finds a city.", "parameters": CITY}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def _body(**fields: Any) -> dict[str, Any]:
    return {"input": "Say something.", "max_output_tokens": 12, "temperature": 0} | fields


def _asked(server: Running, **fields: Any) -> Any:
    reply = server.post(PATH, _body(**fields))
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json())
    return reply.json()


def _put_together(events: list[Any]) -> list[Any]:
    """The output that a stream's events say, by the protocol's rules alone; parts and items end with all that was said."""
    items: list[Any] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            continue
        if "output_index" not in event:
            continue
        item = items[event["output_index"]]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "output_text.delta":
            item["content"][event["content_index"]]["text"] += event["delta"]
            item["content"][event["content_index"]]["logprobs"] += event["logprobs"]
        elif kind == "output_text.done":
            part = item["content"][event["content_index"]]
            assert (part["text"], part["logprobs"]) == (event["text"], event["logprobs"])
        elif kind == "content_part.done":
            assert item["content"][event["content_index"]] == event["part"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            assert item | {"status": ""} == event["item"] | {"status": ""}
            items[event["output_index"]] = event["item"]
    return items


def _without_ids(output: list[Any]) -> list[Any]:
    return [item | {"id": "", "call_id": ""} for item in output]


def test_an_answer_is_that_of_a_chat_completion(server: Running) -> None:
    found = _asked(server, instructions="Be short.", metadata={"who": "me"}, **LOGPROBS)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say something."}]
    chat = server.chat(messages, max_tokens=12, logprobs=True, top_logprobs=2)
    choice = chat["choices"][0]
    (item,) = found["output"]
    assert item["content"] == [
        {
            "type": "output_text",
            "text": choice["message"]["content"],
            "annotations": [],
            "logprobs": choice["logprobs"]["content"],
        }
    ]
    usage = found["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"] == 12
    assert (found["status"], item["status"]) == ("incomplete", "incomplete")
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (found["metadata"], found["instructions"], found["store"]) == ({"who": "me"}, "Be short.", False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "seed": 4, "max_output_tokens": 30, **LOGPROBS},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 100},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look_up"}, "max_output_tokens": 100},
        {"text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}}, "max_output_tokens": 80},
    ],
    ids=["greedy", "logprobs", "required", "named", "schema"],
)
def test_a_stream_says_what_the_plain_reply_says(server: Running, fields: dict[str, Any]) -> None:
    plain, events = _asked(server, **fields), server.named_events(PATH, _body(**fields))
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{plain['status']}"
    last = events[-1]["response"]
    assert _without_ids(_put_together(events)) == _without_ids(last["output"]) == _without_ids(plain["output"])
    own = {"id": "", "output": [], "created_at": 0, "completed_at": 0, "usage": {}}
    assert last | own == plain | own
    assert last["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}


def test_a_whole_answer_is_completed(server: Running) -> None:
    found = _asked(server, logit_bias={str(server.model.tokenizer.eos_token_id): 100})
    assert (found["status"], found["incomplete_details"]) == ("completed", None)
    assert found["output"][0]["content"][0]["text"] == ""


def test_calls_keep_their_schema(server: Running) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 3}
    found = _asked(server, **fields, max_output_tokens=200)
    (call,) = found["output"]
    assert (call["type"], call["name"], found["status"]) == ("function_call", "look_up", "completed")
    jsonschema.validate(json.loads(call["arguments"]), CITY)
    assert found["tools"] == [TOOL | {"strict": False}]


@pytest.mark.parametrize(
    "given", [{"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}]
)
def test_an_answer_keeps_its_format(server: Running, given: dict[str, Any]) -> None:
    found = _asked(server, text={"format": given}, max_output_tokens=80, temperature=1)
    value = json.loads(found["output"][0]["content"][0]["text"])
    jsonschema.validate(value, given.get("schema", {"type": "object"}))
    assert found["text"]["format"] == given


def test_items_are_the_messages_they_say(server: Running) -> None:
    call = {"type": "function_call", "name": "look_up", "status": "completed"}
    told = [{"type": "input_text", "text": "Go"}, {"type": "input_text", "text": "on."}]
    said = [{"type": "output_text", "text": "Well.", "annotations": []}]
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": told},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": said},
        call | {"call_id": "call_1", "arguments": '{"name": "Ulm"}'},
        call | {"call_id": "call_2", "arguments": '{"name": "Bonn"}'},
        {"type": "function_call_output", "call_id": "call_2", "output": "no"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "yes"}]},
    ]  # fmt: skip
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "look_up", "arguments": f'{{"name": "{city}"}}'}}
        for n, city in ((1, "Ulm"), (2, "Bonn"))
    ]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Go\n\non."},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "yes"},
        {"role": "tool", "tool_call_id": "call_2", "content": "no"},
    ]
    tokens = server.post("/tokenize", {"messages": messages}).json()["count"]
    found = _asked(server, input=items)
    assert found["usage"]["input_tokens"] == tokens
    chat = server.chat(messages, max_tokens=12)
    assert found["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": "x"},
                    {"type": "function_call", "call_id": "a", "name": "a b", "arguments": "{}"}]}, "input[1]"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": 5}]}, "input[0].output"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "later"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}}, "text.format.schema"),
        ({"stream_options": {}}, "stream_options"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    reply = server.post(PATH, _body(**fields))
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert error["message"].startswith(param)
    assert " 400 POST " in server.line_of(reply)


def test_a_longer_prompt_than_the_context_is_refused(server: Running) -> None:
    error = server.post(PATH, _body(input="word " * 4000)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_stored_responses_are_not_there(server: Running) -> None:
    assert server.client.get(f"{PATH}/resp_1").status_code == 404


def test_a_failing_engine_is_an_event_of_its_own(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_mixtral.server.rows import EngineRows

    with serve() as server:
        step = EngineRows.step

        def failing(rows: EngineRows) -> None:
            monkeypatch.setattr(EngineRows, "step", step)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(EngineRows, "step", failing)
        events = server.named_events(PATH, _body())
        assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
        assert EVENT.validate_python(events[-1]).response.error.code == "server_error"


def test_the_openai_package_reads_it_all(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "input": "Say something.", "max_output_tokens": 20, "temperature": 0}
        whole = client.responses.create(**asked)
        assert whole.output_text
        assert whole.usage is not None
        with client.responses.create(**asked, stream=True) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text
        one = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
        with client.responses.stream(**asked | one) as stream:
            final = stream.get_final_response()
        jsonschema.validate(json.loads(final.output[0].arguments), CITY)  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**asked, previous_response_id="resp_1")
        assert refused.value.param == "previous_response_id"
