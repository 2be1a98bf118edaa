"""Bodies as tables of fields: one validator for all of them, and their schemas for /openapi.json.

A field that is absent or null has its default. Unknown fields are ignored, as OpenAI's own newer ones would be. A field that is
known and cannot be kept is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.kinds import Choice, ValueKind, refuse

__all__ = ["BodyField", "BodyTable", "Tagged"]


@dataclass(frozen=True)
class BodyField:
    """One field.

    Args:
        kind: None for one that is not supported.
        about: a sentence for the description of the API.
        default: when it is absent or null.
        required: whether it must be there.
        off: of an unsupported field, values that ask for nothing and are let through.
        instead: of an unsupported field, what to do, in words.
    """

    name: str
    kind: ValueKind | None
    about: str
    default: Any = None
    required: bool = False
    off: Sequence[Any] = ()
    instead: str = "leave it out"


@dataclass(frozen=True)
class BodyTable(ValueKind):
    """An object with known fields.

    Args:
        name: what the description of the API calls it; "" for one that is written where it is used.
    """

    fields: tuple[BodyField, ...]
    name: str = ""

    def read(self, value: Any, param: str = "") -> dict[str, Any]:
        """The known fields by name, checked, defaults filled in.

        Raises:
            ApiError: 400 that names the first field that is wrong.
        """
        if not isinstance(value, dict):
            if not param:
                raise ApiError(
                    400, f"the body is a JSON {_json_name(value)}; it must be an object", code="invalid_value"
                )
            raise refuse(value, param, self.words)
        return {field.name: self._field(field, value, param) for field in self.fields}

    def _field(self, field: BodyField, body: Mapping[str, Any], param: str) -> Any:
        place = f"{param}.{field.name}" if param else field.name
        value = body.get(field.name)
        if value is None:
            if field.required:
                raise ApiError(400, f"{place} is missing; give {field.about[:1].lower()}{field.about[1:]}", place)
            return field.default
        if field.kind is None:
            if any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in field.off):
                return None
            raise ApiError(400, f"{place} is not supported here; {field.instead}", place, code="unsupported_parameter")
        return field.kind.read(value, place)

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/components/schemas/{self.name}"} if self.name else self.object_schema()

    def object_schema(self) -> dict[str, Any]:
        """The schema itself, where ``schema`` refers to it by name."""
        properties: dict[str, Any] = {}
        for field in self.fields:
            if field.kind is None:
                allowed = [*field.off, None]
                properties[field.name] = {"enum": allowed, "description": f"Not supported. {field.about}"}
                continue
            own = field.kind.schema()
            described = {"description": field.about} | ({} if field.default is None else {"default": field.default})
            if field.required:
                properties[field.name] = {"allOf": [own], **described} if "$ref" in own else own | described
            else:
                properties[field.name] = {"anyOf": [own, {"type": "null"}], **described}
        required = [field.name for field in self.fields if field.required]
        return {"type": "object", "properties": properties} | ({"required": required} if required else {})

    @property
    def words(self) -> str:
        needed = [f'"{field.name}"' for field in self.fields if field.required]
        return f"an object with {', '.join(needed)}" if needed else "an object"


@dataclass(frozen=True)
class Tagged(ValueKind):
    """One of several objects, told apart by a word in them.

    Args:
        tables: the other fields, by that word; what is read has the word as well.
        key: the word's field.
        usual: the word where there is none.
    """

    tables: Mapping[str, BodyTable]
    key: str = "type"
    usual: str | None = None

    def read(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(value, param, self.words)
        given, place = value.get(self.key), f"{param}.{self.key}"
        word = self.usual if given is None else given
        if word is None:
            raise ApiError(400, f"{place} is missing; it must be {self._choices}", place)
        if not isinstance(word, str) or word not in self.tables:
            raise refuse(word, place, self._choices)
        return {self.key: word} | self.tables[word].read(value, param)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [self._schema(word, table) for word, table in self.tables.items()]}

    @property
    def words(self) -> str:
        return f'an object with "{self.key}"'

    @property
    def _choices(self) -> str:
        return Choice(tuple(self.tables)).words

    def _schema(self, word: str, table: BodyTable) -> dict[str, Any]:
        if word == self.usual:
            return {"allOf": [table.schema(), {"properties": {self.key: {"enum": [word, None]}}}]}
        return {"allOf": [table.schema(), {"properties": {self.key: {"const": word}}, "required": [self.key]}]}


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
