"""Short strings that patterns and formats allow: what a mask cannot tell is how to get to the end of ``.*[0-9]{3}``."""

from __future__ import annotations

import importlib
import json
import re
import string
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_mixtral.constraints.specs import ConstraintSpec, JsonSchema, Regex

__all__ = ["examples", "shortest_match"]

MAX_EXAMPLES = 32
MAX_CHARACTERS = 2_000
FORMATS = {
    "date-time": "2000-01-01T00:00:00Z", "time": "00:00:00Z", "date": "2000-01-01", "duration": "P1D", "email": "a@a.aa",
    "hostname": "a", "ipv4": "0.0.0.0", "ipv6": "::", "uuid": "00000000-0000-0000-0000-000000000000", "uri": "a:a",
}  # fmt: skip
CATEGORIES = {"CATEGORY_DIGIT": "0", "CATEGORY_WORD": "a", "CATEGORY_SPACE": " "}
LIKELY = string.ascii_lowercase + string.digits + string.ascii_uppercase + " " + string.punctuation + "é"


def examples(spec: ConstraintSpec) -> list[str]:
    """Texts a part of ``spec`` may be, as they are written: of a schema strings between their quotes."""
    if isinstance(spec, Regex):
        found = shortest_match(spec.pattern)
        return [] if found is None else [found]
    schemas = (spec,) if isinstance(spec, JsonSchema) else spec.schemas
    strings = dict.fromkeys(text for schema in schemas for text in _of_schema(schema.document))
    return [json.dumps(text, ensure_ascii=False)[1:-1] for text in list(strings)[:MAX_EXAMPLES]]


def _of_schema(node: object) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _of_schema(part)
    if not isinstance(node, dict):
        return
    patterns = [node.get("pattern"), *(keys if isinstance(keys := node.get("patternProperties"), dict) else ())]
    for pattern in patterns:
        found = shortest_match(pattern) if isinstance(pattern, str) else None
        if found is not None:
            # Where a pattern may lie anywhere in a string, what is missing to its length is put before or behind it.
            missing = _missing(node.get("minLength"), found)
            yield from dict.fromkeys((found + missing, missing + found))
    if isinstance(kind := node.get("format"), str) and kind in FORMATS:
        yield FORMATS[kind]
    for part in node.values():
        yield from _of_schema(part)


def _missing(least: object, found: str) -> str:
    return "a" * min(least - len(found), MAX_CHARACTERS) if isinstance(least, int) else ""


def shortest_match(pattern: str) -> str | None:
    """A text that ``pattern`` matches, among the shortest; None where none is found. Its anchors are passed over.

    Read by Python's own parser of regular expressions, whose syntax is nearly llguidance's. A wrong guess is harmless: it is
    tried and refused.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python's plans for its syntax
            parsed = importlib.import_module("re._parser").parse(pattern)
        found = _shortest(parsed)
    except (re.error, RecursionError, OverflowError, ImportError, AttributeError):
        return None
    return found if found is not None and len(found) <= MAX_CHARACTERS else None


def _shortest(nodes: Sequence[Any]) -> str | None:
    parts = []
    for operation, argument in nodes:
        part = _of_node(str(operation), argument)
        if part is None or len(part) > MAX_CHARACTERS:
            return None
        parts.append(part)
    return "".join(parts)


def _of_node(operation: str, argument: Any) -> str | None:
    match operation:
        case "LITERAL":
            return chr(argument)
        case "NOT_LITERAL":
            return next(sign for sign in LIKELY if ord(sign) != argument)
        case "ANY":
            return "a"
        case "AT":
            return ""
        case "IN":
            return _of_class(argument)
        case "SUBPATTERN":
            return _shortest(argument[-1])
        case "ATOMIC_GROUP":
            return _shortest(argument)
        case "BRANCH":
            found = [text for text in map(_shortest, argument[1]) if text is not None]
            return min(found, key=len, default=None)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            least, _, repeated = argument
            text = _shortest(repeated) if least else ""
            return None if text is None or len(text) * int(least) > MAX_CHARACTERS else text * int(least)
    return None


def _of_class(items: Sequence[Any]) -> str | None:
    """A character of ``[...]``."""
    is_negated = str(items[0][0]) == "NEGATE"
    if not is_negated:
        operation, argument = str(items[0][0]), items[0][1]
        if operation in ("LITERAL", "RANGE"):
            return chr(argument if operation == "LITERAL" else argument[0])
        return CATEGORIES.get(str(argument), "-")
    return next((sign for sign in LIKELY if not any(_holds(item, sign) for item in items[1:])), None)


def _holds(item: Any, sign: str) -> bool:
    operation, argument = str(item[0]), item[1]
    if operation == "RANGE":
        return bool(argument[0] <= ord(sign) <= argument[1])
    if operation == "LITERAL":
        return bool(argument == ord(sign))
    kinds = {"DIGIT": sign.isdigit(), "SPACE": sign.isspace(), "WORD": sign.isalnum() or sign == "_"}
    name = str(argument).removeprefix("CATEGORY_")
    return not kinds[name.removeprefix("NOT_")] if name.startswith("NOT_") else kinds.get(name, True)
