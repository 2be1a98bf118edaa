"""pydantic-ai's OpenAI chat model: https://pypi.org/project/pydantic-ai/"""

from __future__ import annotations

import asyncio

from city import City
from outcomes import BASE_URL, CITY, MODEL, check
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key="none"))


def chat() -> None:
    reply = Agent(model).run_sync("Hello", model_settings={"max_tokens": 8})
    assert isinstance(reply.output, str)


def stream() -> None:
    async def texts() -> list[str]:
        async with Agent(model).run_stream("Hello", model_settings={"max_tokens": 8}) as reply:
            return [text async for text in reply.stream_text(delta=True, debounce_by=None)]

    assert asyncio.run(texts())


def tools() -> None:
    # Its way to a typed answer is a call that is required.
    assert isinstance(Agent(model, output_type=City).run_sync(CITY, model_settings={"max_tokens": 200}).output, City)


def schema() -> None:
    agent = Agent(model, output_type=NativeOutput(City))
    assert isinstance(agent.run_sync(CITY, model_settings={"max_tokens": 200}).output, City)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
