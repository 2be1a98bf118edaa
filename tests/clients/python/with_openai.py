"""The openai package: https://pypi.org/project/openai/"""

from __future__ import annotations

import json

from city import City
from openai import OpenAI
from outcomes import BASE_URL, CITY, MODEL, PARAMETERS, check

client = OpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": PARAMETERS,
    },
}
REQUIRED = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}


def chat() -> None:
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert reply.choices[0].message.content is not None
    assert reply.usage.completion_tokens <= 8


def stream() -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options=options
    ) as chunks:
        chunks = list(chunks)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens <= 8


def tools() -> None:
    (call,) = client.chat.completions.create(**REQUIRED, parallel_tool_calls=False).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] is not None
    with client.chat.completions.stream(**REQUIRED, parallel_tool_calls=False) as events:
        found = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in found] == ["weather"]
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=turns, tools=[WEATHER], max_tokens=8).choices


def schema() -> None:
    reply = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": CITY}], response_format=City, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, City)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
