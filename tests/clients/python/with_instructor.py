"""instructor over the openai package: https://pypi.org/project/instructor/"""

from __future__ import annotations

import instructor
from city import City
from openai import OpenAI
from outcomes import BASE_URL, CITY, MODEL, check

ASK = {"model": MODEL, "messages": [{"role": "user", "content": CITY}], "max_tokens": 200, "max_retries": 0}


def _client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=BASE_URL, api_key="none", max_retries=0), mode=mode)


def chat() -> None:
    answer, reply = _client(instructor.Mode.TOOLS).chat.completions.create_with_completion(response_model=City, **ASK)
    assert isinstance(answer, City)
    assert reply.usage.completion_tokens


def stream() -> None:
    parts = list(_client(instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(response_model=City, **ASK))
    assert len(parts) > 1
    assert parts[-1].name is not None


def tools() -> None:
    assert isinstance(_client(instructor.Mode.TOOLS).chat.completions.create(response_model=City, **ASK), City)


def schema() -> None:
    assert isinstance(_client(instructor.Mode.JSON_SCHEMA).chat.completions.create(response_model=City, **ASK), City)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
