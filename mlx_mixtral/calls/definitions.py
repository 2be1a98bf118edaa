"""What a request says about tools: their definitions, which may be called, and how many at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_mixtral.arguments import shown
from mlx_mixtral.constraints.specs import JsonSchema
from mlx_mixtral.errors import ConstraintError, InvalidRequestError

__all__ = ["MAX_CALLS", "MAX_TOOLS", "NO_TOOLS", "Tool", "ToolMode", "ToolUse", "read_tools"]

MAX_TOOLS = 128
MAX_CALLS = 16
"""Calls of one answer."""
MAX_DEFINITIONS_BYTES = 512_000
"""Of all definitions of a request together, as JSON."""

ToolMode = Literal["auto", "none", "required"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES: dict[str, ToolMode] = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
# Keywords beside which a list of properties says nothing of what else an object may hold.
_OPEN_KEYWORDS = (
    "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref", "allOf", "anyOf", "oneOf",
    "if", "dependentSchemas",
)  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A function the model may call.

    Attributes:
        parameters: the schema as it was given, for the prompt; {} where there is none.
        strict: whether keywords of the schema that cannot be kept are an error.
        place: where it stands in the request, "tools[0].function".
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    place: str = ""

    @property
    def definition(self) -> dict[str, Any]:
        """As chat formats are given it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def arguments(self) -> JsonSchema:
        """What a call's arguments keep."""
        return JsonSchema(self.arguments_schema, strict=self.strict)

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The schema that a call's arguments keep: an object.

        A tool without parameters takes none. Where properties are listed, others are left out unless the schema speaks of them:
        a model invents arguments otherwise, and a function that is called with them fails.
        """
        schema = dict(self.parameters)
        if not schema:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        schema["type"] = "object"
        if "properties" in schema and not any(keyword in schema for keyword in _OPEN_KEYWORDS):
            schema["additionalProperties"] = False
        return schema


@dataclass(frozen=True)
class ToolUse:
    """Which tools there are, and what the answer has to be.

    Attributes:
        tools: all that the prompt describes.
        mode: "auto": text or calls; "none": text; "required": calls.
        callable_names: those that may be called, all of them where it is empty.
        max_calls: most calls of the answer.
        is_legacy: it was said with ``functions`` and ``function_call``, and wants its answer so.
    """

    tools: tuple[Tool, ...] = ()
    mode: ToolMode = "auto"
    callable_names: frozenset[str] = frozenset()
    max_calls: int = MAX_CALLS
    is_legacy: bool = False

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Tools that the answer may call."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if not self.callable_names or tool.name in self.callable_names)

    @property
    def described_tools(self) -> tuple[Tool, ...]:
        """Tools that the prompt describes: none where none may be called, all where some may, so that a prompt's beginning
        stays the same from turn to turn."""
        return () if self.mode == "none" else self.tools


NO_TOOLS = ToolUse()


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    *,
    functions: Sequence[Mapping[str, Any]] | None = None,
    function_call: str | Mapping[str, Any] | None = None,
) -> ToolUse:
    """What a request's fields say, in OpenAI's form, the one before ``tools`` included.

    Args:
        tools: ``{"type": "function", "function": {"name", "description", "parameters", "strict"}}`` each; an empty list is
            none.
        tool_choice: "auto", "none", "required" (or "any"), ``{"type": "function", "function": {"name": …}}`` (or ``{"type":
            "tool", "name": …}``), ``{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}``.
        parallel_tool_calls: False: one call at most.
        functions, function_call: the older form; a list of functions, and "auto", "none" or ``{"name": …}``.

    Raises:
        InvalidRequestError: the message begins with the field, "tools[0].function.parameters".
    """
    is_legacy = not tools and bool(functions)
    listed = _list("functions", functions) if is_legacy else _list("tools", tools)
    where = "functions" if is_legacy else "tools"
    if len(listed) > MAX_TOOLS:
        raise InvalidRequestError(f"{where}: there are {len(listed)}; at most {MAX_TOOLS} are taken: leave some out")
    read = tuple(_tool(f"{where}[{index}]", given, is_legacy) for index, given in enumerate(listed))
    _check_size(where, read)
    for index, tool in enumerate(read):
        if any(tool.name == other.name for other in read[:index]):
            raise InvalidRequestError(f"{where}[{index}]: there is another tool of the name {tool.name!r}; rename one")
    key, choice = ("function_call", function_call) if is_legacy else ("tool_choice", tool_choice)
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InvalidRequestError(f"parallel_tool_calls is {shown(parallel_tool_calls)}; it must be true or false")
    mode, names, is_one = _choice(key, choice)
    if unknown := names - {tool.name for tool in read}:
        known = ", ".join(tool.name for tool in read) or "none"
        raise InvalidRequestError(f"{key}: there is no tool {min(unknown)!r}; those of the request are {known}")
    if mode == "required" and not read:
        raise InvalidRequestError(f"{key} asks for a call, and there are no {where}; give some")
    is_one = is_one or is_legacy or parallel_tool_calls is False
    return ToolUse(read, mode, frozenset(names), 1 if is_one else MAX_CALLS, is_legacy)


def _list(name: str, value: object) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{name} is {shown(value)}; it must be a list")
    return value


def _tool(place: str, given: object, is_legacy: bool) -> Tool:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{place} is {shown(given)}; it must be an object")
    function: object = given
    if not is_legacy:
        if given.get("type", "function") != "function":
            raise InvalidRequestError(f'{place}.type is {shown(given["type"])}; only "function" is supported')
        # Some clients leave out the level of "function", as the Responses API does.
        if "function" in given or "name" not in given:
            function, place = given.get("function"), f"{place}.function"
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f'{place} is {shown(function)}; it must be {{"name": …, "parameters": {{…}}}}')
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place}.name is {shown(name)}; it must be 1 to 64 of a-z, A-Z, 0-9, underscore and dash"
        )
    if not isinstance(description, str | None):
        raise InvalidRequestError(f"{place}.description is {shown(description)}; it must be text")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidRequestError(f"{place}.strict is {shown(strict)}; it must be true or false")
    tool = Tool(name, description or "", _parameters(place, function.get("parameters")), bool(strict), place)
    try:
        _ = tool.arguments
    except ConstraintError as error:
        raise InvalidRequestError(f"{place}.parameters: {error}") from None
    return tool


def _parameters(place: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{place}.parameters is {shown(value)}; it must be a JSON schema, an object")
    kind = value.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequestError(f'{place}.parameters.type is {shown(kind)}; arguments are an object: "object"')
    return value


def _check_size(where: str, tools: Sequence[Tool]) -> None:
    size = len(json.dumps([tool.definition for tool in tools], ensure_ascii=False).encode("utf-8", "replace"))
    if size > MAX_DEFINITIONS_BYTES:
        raise InvalidRequestError(
            f"{where} have {size} bytes; at most {MAX_DEFINITIONS_BYTES} are taken: leave some out"
        )


def _choice(key: str, choice: object) -> tuple[ToolMode, set[str], bool]:
    """The mode, names of the tools it is limited to (all where none), and whether it is for one call."""
    if choice is None:
        return "auto", set(), False
    if isinstance(choice, str) and choice in _MODES:
        return _MODES[choice], set(), False
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(choice, Mapping) and isinstance(kind, str | None):
        if kind in _MODES:
            return _MODES[kind], set(), False
        if kind == "allowed_tools":
            return _allowed(key, choice.get("allowed_tools", choice))
        if kind in (None, "function", "tool") and (name := _named(choice)) is not None:
            return "required", {name}, True
    raise InvalidRequestError(
        f'{key} is {shown(choice)}; it must be "auto", "none", "required", or '
        '{"type": "function", "function": {"name": …}}'
    )


def _named(choice: Mapping[str, Any]) -> str | None:
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _allowed(key: str, choice: object) -> tuple[ToolMode, set[str], bool]:
    mode = choice.get("mode", "auto") if isinstance(choice, Mapping) else None
    listed = choice.get("tools") if isinstance(choice, Mapping) else None
    names = [_named(each) if isinstance(each, Mapping) else None for each in listed] if isinstance(listed, list) else []
    if mode not in ("auto", "required") or not names or None in names:
        raise InvalidRequestError(
            f'{key}.allowed_tools is {shown(choice)}; it must be {{"mode": "auto" or "required", "tools": [{{"type": '
            '"function", "function": {"name": …}}]}'
        )
    return mode, {name for name in names if name is not None}, False
