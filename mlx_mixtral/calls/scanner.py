"""Calls in JSON, read character by character: names and arguments are known as soon as they are written."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from enum import Enum, auto

__all__ = ["CallScanner", "Found", "FoundKind", "Status"]

_SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")


class Status(Enum):
    """Of a scan: more is to come, all is read, or what came is no list of calls."""

    OPEN = auto()
    DONE = auto()
    BROKEN = auto()


class FoundKind(Enum):
    """What a character completed."""

    NAME = auto()
    ARGUMENTS = auto()
    END = auto()


@dataclass(frozen=True)
class Found:
    """A name, a piece of arguments, or the end of a call."""

    kind: FoundKind
    text: str = ""


class _Place(Enum):
    LIST = auto()
    ITEM = auto()
    BETWEEN_ITEMS = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()


class _Value:
    """One JSON value: where it ends. What is within brackets is counted, not checked."""

    def __init__(self, first: str) -> None:
        self.text = first
        self.is_text, self.is_object = first == '"', first == "{"
        self._depth = int(first in "{[")
        self._in_string, self._is_escaped = self.is_text, False
        self._is_scalar = not self._depth and not self.is_text
        self.is_whole = False

    def add(self, char: str) -> bool:
        """Take a character; False where the value has ended before it, as numbers and words do."""
        if self._is_scalar and char in ",}]" + _SPACE:
            self.is_whole = True
            return False
        self.text += char
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
                self.is_whole = not self._depth
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_whole = self._depth == 0
        return True


class CallScanner:
    """Reads ``{"name": …, "arguments": {…}}``, one or a list of them; other keys are passed over.

    Args:
        is_list: whether it is a list.
        names: of tools; what calls another is no call.

    Attributes:
        unread: what came since the last call ended, and named none so far.
    """

    def __init__(self, *, is_list: bool, names: Set[str]) -> None:
        self._is_list, self._names = is_list, names
        self._place = _Place.LIST if is_list else _Place.ITEM
        self.status = Status.OPEN
        self.unread = ""
        self._begin_call()

    def _begin_call(self) -> None:
        self.is_in_call = False
        """Whether a call was named and has not ended."""
        self._key = ""
        self._value: _Value | None = None
        self._arguments: str | None = None

    def add(self, char: str) -> list[Found]:
        """Take a character; what it completed."""
        if not self.is_in_call:
            self.unread += char
        found: list[Found] = []
        value = self._value
        if value is not None and self._place in (_Place.KEY, _Place.VALUE):
            if value.add(char):
                if self._streams(value):
                    found.append(Found(FoundKind.ARGUMENTS, char))
                if value.is_whole:
                    found += self._end_value(value)
                return found
            found += self._end_value(value)
            if self.status is Status.BROKEN:
                return found
        if char not in _SPACE:
            found += self._step(char)
        return found

    def _streams(self, value: _Value) -> bool:
        return self._place is _Place.VALUE and self._key in _ARGUMENTS and value.is_object and self.is_in_call

    def _step(self, char: str) -> list[Found]:
        place = self._place
        if place is _Place.LIST and char == "[":
            self._place = _Place.ITEM
        elif place is _Place.ITEM and char == "{":
            self._place = _Place.FIRST_KEY
        elif place is _Place.BETWEEN_ITEMS and char == ",":
            self._place = _Place.ITEM
        elif place is _Place.BETWEEN_ITEMS and char == "]":
            self.status = Status.DONE
        elif place in (_Place.FIRST_KEY, _Place.KEY) and char == '"':
            self._place, self._value = _Place.KEY, _Value(char)
        elif place is _Place.COLON and char == ":":
            self._place, self._value = _Place.VALUE, None
        elif place is _Place.VALUE and char not in ",:}]":
            self._value = _Value(char)
            if self._key in _ARGUMENTS and self._arguments is not None:
                return self._break(char)
            return [Found(FoundKind.ARGUMENTS, char)] if self._streams(self._value) else []
        elif place is _Place.AFTER_VALUE and char == ",":
            self._place = _Place.KEY
        elif place is _Place.AFTER_VALUE and char == "}":
            return self._end_call(char)
        else:
            return self._break(char)
        return []

    def _end_value(self, value: _Value) -> list[Found]:
        self._value = None
        if self._place is _Place.KEY:
            key = _decoded(value.text)
            self._key, self._place = key if isinstance(key, str) else "", _Place.COLON
            return []
        self._place = _Place.AFTER_VALUE
        if self._key == "name":
            return self._name(value)
        if self._key in _ARGUMENTS:
            return self._whole_arguments(value)
        return []

    def _name(self, value: _Value) -> list[Found]:
        name = _decoded(value.text)
        if self.is_in_call or not isinstance(name, str) or name not in self._names:
            return self._break(value.text[-1])
        self.is_in_call, self.unread = True, ""
        held = [] if self._arguments is None else [Found(FoundKind.ARGUMENTS, self._arguments)]
        return [Found(FoundKind.NAME, name), *held]

    def _whole_arguments(self, value: _Value) -> list[Found]:
        if value.is_object:
            self._arguments = value.text
            return []  # passed on as they came, or held for the name
        decoded = _decoded(value.text)
        if decoded is not None and not isinstance(decoded, str):
            return self._break(value.text[-1])
        # None, or JSON as text within JSON.
        self._arguments = decoded or "{}"
        return [Found(FoundKind.ARGUMENTS, self._arguments)] if self.is_in_call else []

    def _end_call(self, char: str) -> list[Found]:
        if not self.is_in_call:
            return self._break(char)
        found = [] if self._arguments is not None else [Found(FoundKind.ARGUMENTS, "{}")]
        self._begin_call()
        if self._is_list:
            self._place = _Place.BETWEEN_ITEMS
        else:
            self.status = Status.DONE
        return [*found, Found(FoundKind.END)]

    def _break(self, char: str) -> list[Found]:
        self.status = Status.BROKEN
        if self.is_in_call:
            self.unread = char
        return []


def _decoded(text: str) -> object:
    """The JSON of a text; a number where it is none, which no key, name or arguments are."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return 0
