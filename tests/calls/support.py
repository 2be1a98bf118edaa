"""Tools and messages that the tests of calls share."""

from __future__ import annotations

from typing import Any

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, parameters: dict[str, Any] | None = None, **function: Any) -> dict[str, Any]:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **function}}


WEATHER, NOW = tool("get_weather", CITY, description="Weather of a city"), tool("now")
TOOLS = [WEATHER, NOW]


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any = "{}", call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*listed: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return says("assistant", content, tool_calls=list(listed))


def result(content: Any, call_id: str | None = "abcdefghi", **more: Any) -> dict[str, Any]:
    return says("tool", content, tool_call_id=call_id, **more)


ASK = says("user", "Weather in Paris?")
