"""Kinds of JSON values: each checks a value, and describes itself as a JSON schema for /openapi.json."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.arguments import is_integer, is_number, shown
from mlx_mixtral.server.wire.errors import ApiError

__all__ = [
    "Anything",
    "Choice",
    "Either",
    "Flag",
    "Integer",
    "ListOf",
    "MapOf",
    "Number",
    "String",
    "ValueKind",
    "refuse",
    "texts_or_ids",
]


class ValueKind(ABC):
    """One kind of value."""

    @abstractmethod
    def read(self, value: Any, param: str) -> Any:
        """The value, checked.

        Raises:
            ApiError: 400, with ``param``.
        """

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """As a JSON schema (draft 2020-12)."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What a value must be, in words."""


def refuse(value: Any, param: str, words: str) -> ApiError:
    """The error of a value that must be something else."""
    return ApiError.field(param, f"is {shown(value)}; it must be {words}")


@dataclass(frozen=True)
class Flag(ValueKind):
    """True or false."""

    def read(self, value: Any, param: str) -> bool:
        if not isinstance(value, bool):
            raise refuse(value, param, self.words)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    @property
    def words(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Integer(ValueKind):
    """An integer; one that JSON writes as 3.0 counts."""

    least: int | None = None
    most: int | None = None

    def read(self, value: Any, param: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_integer(value) or not _within(value, self.least, self.most):
            raise refuse(value, param, self.words)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer"} | _limits(self.least, self.most)

    @property
    def words(self) -> str:
        return f"an integer{_range(self.least, self.most)}"


@dataclass(frozen=True)
class Number(ValueKind):
    """A finite number."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def read(self, value: Any, param: str) -> float:
        try:
            number = float(value) if is_number(value) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not _within(number, self.least, self.most):
            raise refuse(value, param, self.words)
        if self.above is not None and number <= self.above:
            raise refuse(value, param, self.words)
        return number

    def schema(self) -> dict[str, Any]:
        above = {} if self.above is None else {"exclusiveMinimum": self.above}
        return {"type": "number"} | _limits(self.least, self.most) | above

    @property
    def words(self) -> str:
        above = "" if self.above is None else f" above {self.above:g}"
        joint = " and" if above and (self.least is not None or self.most is not None) else ""
        return f"a number{above}{joint}{_range(self.least, self.most)}"


@dataclass(frozen=True)
class String(ValueKind):
    """A string."""

    least: int = 0
    most: int | None = None

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise refuse(value, param, self.words)
        if not _within(len(value), self.least, self.most):
            raise ApiError.field(param, f"has {len(value)} characters; it must be {self.words}")
        return value

    def schema(self) -> dict[str, Any]:
        limits = {"minLength": self.least or None, "maxLength": self.most}
        return {"type": "string"} | {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def words(self) -> str:
        if self.most is not None:
            return f"a string of {self.least} to {self.most} characters"
        return "a string that is not empty" if self.least else "a string"


@dataclass(frozen=True)
class Choice(ValueKind):
    """One of a few words."""

    options: tuple[str, ...]

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise refuse(value, param, self.words)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.options)}

    @property
    def words(self) -> str:
        return " or ".join(f'"{option}"' for option in self.options)


@dataclass(frozen=True)
class ListOf(ValueKind):
    """A list of one kind."""

    item: ValueKind
    least: int = 0
    most: int | None = None

    def read(self, value: Any, param: str) -> list[Any]:
        if not isinstance(value, list):
            raise refuse(value, param, self.words)
        if not _within(len(value), self.least, self.most):
            raise ApiError.field(param, f"has {len(value)} entries; it must be {self.words}")
        return [self.item.read(each, f"{param}[{index}]") for index, each in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        limits = {"minItems": self.least or None, "maxItems": self.most}
        found = {name: limit for name, limit in limits.items() if limit is not None}
        return {"type": "array", "items": self.item.schema()} | found

    @property
    def words(self) -> str:
        count = (
            f" of {self.least} to {self.most}" if self.most is not None else " that is not empty, of" * bool(self.least)
        )
        return f"a list{count or ' of'} {_many(self.item.words)}".replace("to 1 ", "to 1, each ")


@dataclass(frozen=True)
class MapOf(ValueKind):
    """An object whose values are of one kind."""

    value: ValueKind
    most: int | None = None

    def read(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(value, param, self.words)
        if self.most is not None and len(value) > self.most:
            raise ApiError.field(param, f"has {len(value)} entries; it may have {self.most}")
        return {key: self.value.read(each, f"{param}.{key}") for key, each in value.items()}

    def schema(self) -> dict[str, Any]:
        most = {} if self.most is None else {"maxProperties": self.most}
        return {"type": "object", "additionalProperties": self.value.schema()} | most

    @property
    def words(self) -> str:
        return f"an object whose values are {_many(self.value.words)}"


@dataclass(frozen=True)
class Anything(ValueKind):
    """Any JSON value, or an object."""

    is_object: bool = False

    def read(self, value: Any, param: str) -> Any:
        if self.is_object and not isinstance(value, dict):
            raise refuse(value, param, self.words)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "object"} if self.is_object else {}

    @property
    def words(self) -> str:
        return "an object" if self.is_object else "a JSON value"


@dataclass(frozen=True)
class Either(ValueKind):
    """One of several kinds; the first whose JSON type fits says what is wrong within it."""

    kinds: Sequence[ValueKind]

    def read(self, value: Any, param: str) -> Any:
        deepest: ApiError | None = None
        for kind in self.kinds:
            try:
                return kind.read(value, param)
            except ApiError as error:
                # An error further inside says more: the value was of this kind, but for one part.
                if deepest is None or len(error.param or "") > len(deepest.param or ""):
                    deepest = error
        for kind in self.kinds:
            if isinstance(kind, ListOf) and isinstance(value, list) and value and _takes(kind.item, value[0]):
                return kind.read(value, param)  # it was meant, and says what is wrong with it
        if deepest is not None and deepest.param != param:
            raise deepest
        raise refuse(value, param, self.words)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds]}

    @property
    def words(self) -> str:
        return ", or ".join(kind.words for kind in self.kinds)


def texts_or_ids(most: int) -> Either:
    """Text, token ids, or a list of up to ``most`` of either."""
    ids = ListOf(Integer(0), 1)
    return Either((String(), ids, ListOf(String(), 1, most), ListOf(ids, 1, most)))


def _takes(kind: ValueKind, value: Any) -> bool:
    try:
        kind.read(value, "")
    except ApiError:
        return False
    return True


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _limits(least: float | None, most: float | None) -> dict[str, float]:
    return ({} if least is None else {"minimum": least}) | ({} if most is None else {"maximum": most})


def _range(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    if least is not None:
        return f" of at least {least:g}"
    return "" if most is None else f" of at most {most:g}"


def _many(words: str) -> str:
    """Several of what ``words`` says of one."""
    for one, many in (
        ("an integer", "integers"),
        ("a number", "numbers"),
        ("a string", "strings"),
        ("an object", "objects"),
    ):
        if words.startswith(one):
            return many + words.removeprefix(one)
    return f"values that are {words}"
