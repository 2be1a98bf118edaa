"""Arguments of the public functions, checked where they come in: a wrong type is one line, not a TypeError deep inside."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["as_path", "check_callbacks", "check_type"]

SHOWN_CHARACTERS = 60


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise InvalidRequestError unless ``value`` is one of ``kinds``, which ``wanted`` says in words."""
    if not isinstance(value, kinds):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
        raise InvalidRequestError(f"{name} is {shown}, of type {type(value).__name__}; it must be {wanted}")


def check_callbacks(**callbacks: object) -> None:
    """Raise InvalidRequestError for one that is neither None nor can be called."""
    for name, callback in callbacks.items():
        if not callable(callback):
            check_type(name, callback, type(None), "a function, or None")


def as_path(name: str, value: str | Path) -> Path:
    """A path of this machine, ``~`` expanded.

    Raises:
        InvalidRequestError: of another type, or in the home folder of nobody here.
    """
    check_type(name, value, (str, os.PathLike), "a path, as text or a Path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise InvalidRequestError(
            f"{name} is {str(value)!r}, and {Path(value).parts[0]!r} is nobody's home here; write ./~… for that name itself"
        ) from None
