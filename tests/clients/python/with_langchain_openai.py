"""LangChain's OpenAI chat model: https://pypi.org/project/langchain-openai/"""

from __future__ import annotations

from city import City
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from outcomes import BASE_URL, CITY, MODEL, check

model = ChatOpenAI(base_url=BASE_URL, api_key="none", model=MODEL, max_tokens=200, max_retries=0)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def chat() -> None:
    reply = model.invoke("Hello", max_tokens=8)
    assert isinstance(reply.content, str)
    assert reply.usage_metadata["output_tokens"] <= 8


def stream() -> None:
    chunks = list(model.stream("Hello", max_tokens=8, stream_usage=True))
    assert len(chunks) > 1
    assert any(chunk.usage_metadata for chunk in chunks)


def tools() -> None:
    reply = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke("Hello")
    (call,) = reply.tool_calls
    assert call["name"] == "weather"
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert model.bind_tools([weather]).invoke([HumanMessage("Hello"), reply, result], max_tokens=8).id


def schema() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(City, method=method).invoke(CITY), City), method


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
