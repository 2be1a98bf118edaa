"""Ask a running server with the openai package: a streamed answer, one that keeps to a schema, and a call of a tool.

mlx-mixtral serve MODEL
python examples/openai_client.py [http://127.0.0.1:8080/v1]
"""

import json
import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
text = {"type": "string", "maxLength": 20}
city = {"type": "object", "properties": {"city": text}, "required": ["city"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "weather", "description": "Today's weather.", "parameters": city}}


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


with OpenAI(base_url=base_url, api_key="none") as client:
    model = client.models.list().data[0].id
    asked = {"model": model, "max_tokens": 60, "seed": 1}

    # Leaving the `with` block, or breaking out of the loop and closing the stream, ends the generation on the server.
    with client.chat.completions.create(messages=said("Name three rivers."), stream=True, **asked) as chunks:
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    structure = {"type": "json_schema", "json_schema": {"name": "city", "schema": city, "strict": True}}
    reply = client.chat.completions.create(messages=said("A city, as JSON."), response_format=structure, **asked)
    print("city:", json.loads(reply.choices[0].message.content)["city"])

    reply = client.chat.completions.create(
        messages=said("What is the weather in Lyon?"), tools=[tool], tool_choice="required", **asked
    )
    for call in reply.choices[0].message.tool_calls:
        print("call:", call.function.name, call.function.arguments)
    print(f"{reply.usage.prompt_tokens} + {reply.usage.completion_tokens} tokens")
