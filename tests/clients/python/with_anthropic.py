"""The anthropic package: https://pypi.org/project/anthropic/"""

from __future__ import annotations

from typing import Literal

from anthropic import Anthropic
from outcomes import BASE_URL, CITY, MODEL, PARAMETERS, check
from pydantic import BaseModel, ConfigDict

client = Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key="none", max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "weather",
    "input_schema": PARAMETERS,
}


class City(BaseModel):
    """Without bounds: the package takes them out of the schema before it sends it, and checks them itself."""

    model_config = ConfigDict(extra="forbid")

    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]
    is_capital: bool


def chat() -> None:
    reply = client.messages.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert reply.content[0].type == "text"
    assert reply.usage.output_tokens <= 8
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens == reply.usage.input_tokens


def stream() -> None:
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=8) as events:
        text = "".join(events.text_stream)
        assert events.get_final_message().content[0].text == text


def tools() -> None:
    wanted = {"model": MODEL, "max_tokens": 200, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    reply = client.messages.create(messages=HELLO, **wanted)
    call = next(block for block in reply.content if block.type == "tool_use")
    assert call.input["city"] is not None
    with client.messages.stream(messages=HELLO, **wanted) as events:
        assert any(block.type == "tool_use" for block in events.get_final_message().content)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*HELLO, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=turns, model=MODEL, max_tokens=8, tools=[WEATHER]).content


def schema() -> None:
    reply = client.messages.parse(
        model=MODEL, messages=[{"role": "user", "content": CITY}], output_format=City, max_tokens=200
    )
    assert isinstance(reply.parsed_output, City)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
