"""What requests say about tools: every form that clients send, and one line for each that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_mixtral.calls.definitions import MAX_CALLS, MAX_TOOLS, read_tools
from mlx_mixtral.errors import InvalidRequestError

from .support import CITY, NOW, TOOLS, WEATHER, tool

NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("choice", "mode", "names", "most"),
    [
        (None, "auto", {"get_weather", "now"}, MAX_CALLS),
        ("auto", "auto", {"get_weather", "now"}, MAX_CALLS),
        ("none", "none", set(), MAX_CALLS),
        ("required", "required", {"get_weather", "now"}, MAX_CALLS),
        ("any", "required", {"get_weather", "now"}, MAX_CALLS),
        ({"type": "auto"}, "auto", {"get_weather", "now"}, MAX_CALLS),
        ({"type": "required"}, "required", {"get_weather", "now"}, MAX_CALLS),
        (NAMED, "required", {"now"}, 1),
        ({"type": "function", "name": "now"}, "required", {"now"}, 1),
        ({"type": "tool", "name": "now"}, "required", {"now"}, 1),
        ({"function": {"name": "now"}}, "required", {"now"}, 1),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            "auto",
            {"now"},
            MAX_CALLS,
        ),
        ({"type": "allowed_tools", "mode": "required", "tools": [NAMED]}, "required", {"now"}, MAX_CALLS),
    ],
)
def test_every_form_of_a_choice_is_read(choice: Any, mode: str, names: set[str], most: int) -> None:
    use = read_tools(TOOLS, choice)
    assert (use.mode, {tool.name for tool in use.callable_tools}, use.max_calls) == (mode, names, most)
    assert read_tools(TOOLS, choice, False).max_calls == 1
    assert read_tools(TOOLS, choice, True).max_calls == most


def test_the_prompt_describes_all_tools_or_none() -> None:
    assert [tool.name for tool in read_tools(TOOLS, NAMED).described_tools] == ["get_weather", "now"]
    assert read_tools(TOOLS, "none").described_tools == ()


@pytest.mark.parametrize("tools", [None, [], ()])
@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_no_tools_are_no_error(tools: Any, choice: Any) -> None:
    use = read_tools(tools, choice, True)
    assert (use.tools, use.callable_tools, use.is_legacy) == ((), (), False)


def test_functions_are_tools_of_an_older_form() -> None:
    functions = [each["function"] for each in TOOLS]
    use = read_tools(functions=functions, function_call={"name": "now"})
    assert use.is_legacy
    assert (use.mode, use.max_calls, [tool.name for tool in use.callable_tools]) == ("required", 1, ["now"])
    assert [tool.definition for tool in use.tools] == [tool.definition for tool in read_tools(TOOLS).tools]
    assert read_tools(functions=functions, function_call="none").mode == "none"
    assert read_tools(functions=functions).max_calls == 1


def test_the_form_of_the_responses_api_is_read() -> None:
    flat = {"type": "function", **WEATHER["function"], "strict": True}
    (read,) = read_tools([flat]).tools
    assert (read.name, read.parameters, read.strict, read.place) == ("get_weather", CITY, True, "tools[0]")


CLOSED = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        (None, CLOSED),
        ({}, CLOSED),
        ({"type": "object", "properties": {}}, CLOSED),
        ({"properties": {}}, CLOSED),
        (CITY, CITY | {"additionalProperties": False}),
        (CITY | {"additionalProperties": True}, CITY | {"additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        ({"type": ["object", "null"], "properties": {}}, CLOSED),
        ({"$ref": "#/$defs/a", "$defs": {"a": CITY}}, {"type": "object", "$ref": "#/$defs/a", "$defs": {"a": CITY}}),
    ],
)
def test_arguments_are_an_object_of_what_is_declared(parameters: Any, schema: dict[str, Any]) -> None:
    (read,) = read_tools([tool("f", parameters)]).tools
    assert read.arguments_schema == schema
    assert read.definition["function"]["parameters"] == (parameters or {})


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": "f"}, r"^tools is 'f'; it must be a list"),
        ({"tools": {"type": "function"}}, "^tools is .*; it must be a list"),
        ({"tools": ["f"]}, r"^tools\[0\] is 'f'; it must be an object"),
        ({"tools": [NOW, {"type": "custom", "name": "f"}]}, r"^tools\[1\]\.type is 'custom'; only \"function\""),
        ({"tools": [{"type": "function"}]}, r"^tools\[0\]\.function is None"),
        ({"tools": [tool("a b")]}, r"^tools\[0\]\.function\.name is 'a b'; it must be 1 to 64"),
        ({"tools": [tool("a" * 65)]}, r"^tools\[0\]\.function\.name"),
        ({"tools": [tool("f", description=3)]}, r"^tools\[0\]\.function\.description is 3"),
        ({"tools": [tool("f", strict="yes")]}, r"^tools\[0\]\.function\.strict is 'yes'"),
        ({"tools": [NOW, tool("f", [])]}, r"^tools\[1\]\.function\.parameters is \[\]"),  # type: ignore[arg-type]
        ({"tools": [tool("f", {"type": "string"})]}, r"^tools\[0\]\.function\.parameters\.type is 'string'"),
        ({"tools": [tool("f", DEEP)]}, r"^tools\[0\]\.function\.parameters: the schema is nested more than 50"),
        (
            {"tools": [tool("f", {"properties": {f"a{i}": {} for i in range(513)}})]},
            r"^tools\[0\]\.function\.parameters: the schema has 513 properties",
        ),
        ({"functions": [{"name": "f", "parameters": DEEP}]}, r"^functions\[0\]\.parameters: the schema is nested"),
        ({"tools": [NOW, NOW]}, r"^tools\[1\]: there is another tool of the name 'now'"),
        ({"tools": [tool(f"f{i}") for i in range(MAX_TOOLS + 1)]}, "^tools: there are 129; at most 128"),
        (
            {"tools": [tool(f"f{i}", description="x" * 9000) for i in range(100)]},
            "^tools have 9.* bytes; at most 512000",
        ),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "^tool_choice is 'maybe'; it must be \"auto\""),
        ({"tools": TOOLS, "tool_choice": ["auto"]}, "^tool_choice is "),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "^tool_choice is "),
        ({"tools": TOOLS, "tool_choice": {"type": ["function"], "name": "now"}}, "^tool_choice is "),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "^tool_choice: there is no tool 'x'; .*now"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, r"^tool_choice\.allowed_tools"),
        ({"tool_choice": "required"}, "^tool_choice asks for a call, and there are no tools"),
        ({"tools": [], "tool_choice": NAMED}, "^tool_choice: there is no tool 'now'"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "^function_call: there is no tool 'g'"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "^parallel_tool_calls is 'no'; it must be true or false"),
    ],
)
def test_a_refusal_begins_with_the_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        read_tools(**fields)
    assert "\n" not in str(caught.value)
