"""What a definition may hold, checked before anything is compiled: schemas come from strangers too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_mixtral.errors import ConstraintError

__all__ = [
    "MAX_COMPILED", "MAX_COMPILE_S", "MAX_DEFINITION_BYTES", "MAX_DEPTH", "MAX_ENUM_VALUES", "MAX_PROPERTIES", "MAX_STUCK",
    "check_definition", "check_schema",
]  # fmt: skip

MAX_DEFINITION_BYTES = 64_000
MAX_DEPTH = 50
MAX_PROPERTIES = 512
"""Of all objects of a schema together."""
MAX_ENUM_VALUES = 4_096
"""Of all enumerations of a schema together."""
MAX_COMPILE_S = 5.0
MAX_STUCK = 2
"""Compilations that went on past their deadline, and still do."""
MAX_COMPILED = 64
"""Compiled grammars that are kept."""


def check_definition(what: str, text: str) -> None:
    """Raise ConstraintError unless ``text`` is UTF-8 of at most ``MAX_DEFINITION_BYTES``, and not empty."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConstraintError(
            f"{what} holds a lone surrogate, which no UTF-8 text can; write the character itself"
        ) from None
    if not size:
        raise ConstraintError(f"{what} is empty")
    if size > MAX_DEFINITION_BYTES:
        raise ConstraintError(f"{what} has {size} bytes; at most {MAX_DEFINITION_BYTES} are taken: make it smaller")


def check_schema(schema: dict[str, Any] | bool) -> None:
    """Raise ConstraintError for a schema beyond the limits.

    A string that must match several patterns at once is refused: their product is compiled, which takes longer than any
    deadline for a few of them.
    """
    properties = values = 0
    for node, depth in _nodes(schema):
        if depth > MAX_DEPTH:
            raise ConstraintError(
                f"the schema is nested more than {MAX_DEPTH} levels deep; write it flatter, with $ref"
            )
        for key in ("properties", "patternProperties"):
            properties += len(found) if isinstance(found := node.get(key), dict) else 0
        values += len(found) if isinstance(found := node.get("enum"), list) else 0
    if properties > MAX_PROPERTIES:
        raise ConstraintError(
            f"the schema has {properties} properties; at most {MAX_PROPERTIES} are taken: leave some out"
        )
    if values > MAX_ENUM_VALUES:
        raise ConstraintError(
            f"the schema has {values} enum values; at most {MAX_ENUM_VALUES} are taken: leave some out"
        )
    if isinstance(schema, dict):
        _Patterns(schema).check()


def _nodes(schema: dict[str, Any] | bool) -> Iterator[tuple[dict[str, Any], int]]:
    """Every object in a schema with its depth, be it a schema or not."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict):
            yield item, depth
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(value, depth + 1) for value in inner if isinstance(value, dict | list)]


class _Patterns:
    """How many patterns one string has to match: its own, those of ``allOf`` and ``$ref``, and of one branch of ``anyOf``."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._known: dict[int, int] = {}
        self._open: set[int] = set()

    def check(self) -> None:
        for node, _ in _nodes(self._schema):
            if (count := self._count(node)) > 1:
                raise ConstraintError(
                    f"a string of the schema must match {count} patterns at once (allOf, $ref); write them as one pattern"
                )

    def _count(self, node: object) -> int:
        if not isinstance(node, dict) or id(node) in self._open:
            return 0
        if id(node) not in self._known:
            self._open.add(id(node))
            count = int(isinstance(node.get("pattern"), str))
            count += sum(self._count(part) for part in _listed(node, "allOf"))
            count += sum(
                max((self._count(part) for part in _listed(node, key)), default=0) for key in ("anyOf", "oneOf")
            )
            count += self._count(self._target(node.get("$ref")))
            self._open.discard(id(node))
            self._known[id(node)] = count
        return self._known[id(node)]

    def _target(self, reference: object) -> object:
        """What a reference within the schema leads to; None for others."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: object = self._schema
        for part in reference[1:].split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found


def _listed(node: dict[str, Any], key: str) -> list[Any]:
    return found if isinstance(found := node.get(key), list) else []
