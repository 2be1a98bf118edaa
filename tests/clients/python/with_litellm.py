"""litellm's Python interface: https://pypi.org/project/litellm/"""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches prices otherwise

import litellm
from city import City
from outcomes import BASE_URL, CITY, MODEL, PARAMETERS, check

litellm.telemetry = False
HELLO = [{"role": "user", "content": "Hello"}]
ASK = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": "none", "num_retries": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": PARAMETERS,
    },
}


def chat() -> None:
    reply = litellm.completion(messages=HELLO, max_tokens=8, **ASK)
    assert reply.usage.completion_tokens <= 8
    assert reply.choices[0].message.content is not None


def stream() -> None:
    chunks = list(litellm.completion(messages=HELLO, max_tokens=8, stream=True, **ASK))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def tools() -> None:
    # One call: a small model may write them until its tokens are used up, and the reason it ends would be that.
    wanted = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    reply = litellm.completion(messages=HELLO, max_tokens=200, **wanted, **ASK)
    call = reply.choices[0].message.tool_calls[0]
    assert "city" in json.loads(call.function.arguments), call.function.arguments
    assert reply.choices[0].finish_reason == "tool_calls", reply.choices[0]


def schema() -> None:
    asked = [{"role": "user", "content": CITY}]
    reply = litellm.completion(messages=asked, max_tokens=200, response_format=City, **ASK)
    City.model_validate_json(reply.choices[0].message.content)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
