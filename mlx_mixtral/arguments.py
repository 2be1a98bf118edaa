"""Arguments of the public functions, checked where they come in: a wrong type is one line, not a TypeError deep inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeGuard

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["as_path", "check_callbacks", "check_integer", "check_type", "is_integer", "is_number"]

SHOWN_CHARACTERS = 60


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise InvalidRequestError unless ``value`` is one of ``kinds``, which ``wanted`` says in words."""
    if not isinstance(value, kinds):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
        raise InvalidRequestError(f"{name} is {shown}, of type {type(value).__name__}; it must be {wanted}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None, *, wanted: str = "") -> int:
    """``value``, an integer of at least ``minimum`` and at most ``maximum``.

    Args:
        wanted: what it must be, in words; the range when left out.

    Raises:
        InvalidRequestError: it is not; the message names it and what it must be.
    """
    if not is_integer(value) or value < minimum or (maximum is not None and value > maximum):
        in_range = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InvalidRequestError(f"{name} is {value!r}; it must be {wanted or f'an integer {in_range}'}")
    return value


def check_callbacks(**callbacks: object) -> None:
    """Raise InvalidRequestError for one that is neither None nor can be called."""
    for name, callback in callbacks.items():
        if not callable(callback):
            check_type(name, callback, type(None), "a function, or None")


def as_path(name: str, value: str | Path) -> Path:
    """A path of this machine, ``~`` expanded.

    Raises:
        InvalidRequestError: of another type, empty, or in the home folder of nobody here.
    """
    check_type(name, value, (str, os.PathLike), "a path, as text or a Path")
    if value == "":
        raise InvalidRequestError(f"{name} is an empty path; give one (. is the current folder)")
    if isinstance(value, str) and not value.startswith("~") and str(Path(value)).startswith("~"):
        return Path(os.path.abspath(value))  # noqa: PTH100 - ./~x, which a Path forgets
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise InvalidRequestError(
            f"{name} is {str(value)!r}, and there is no user {Path(value).parts[0]!r} here; write ./~… for a file of that name"
        ) from None
