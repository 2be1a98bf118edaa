"""Arguments of the public functions, checked where they come in: a wrong type is one line, not a TypeError deep inside."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from mlx_mixtral.errors import InvalidRequestError

__all__ = [
    "as_path", "check_callbacks", "check_integer", "check_type", "checked", "is_integer", "is_number", "plain", "shown",
]  # fmt: skip

SHOWN_CHARACTERS = 60

F = TypeVar("F", bound=Callable[..., Any])


def checked(
    *,
    options: Callable[..., Any] | None = None,
    without: tuple[str, ...] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Make a function or class of ours say InvalidRequestError where Python says TypeError for arguments it has no place for.

    Scalars of numpy become Python's numbers on the way. ``help`` shows every option by its name.

    Args:
        options: has the parameters that the function takes as ``**options``; of them those that are not ``without``.
        elsewhere: what to write instead, for arguments that belong to something else.
    """

    def decorate(function: F) -> F:
        if inspect.isclass(function):
            function.__init__ = decorate(function.__init__)  # type: ignore[method-assign]
            return function
        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        if options is not None:
            taken = {*without, "self"}
            others = [each for each in inspect.signature(options).parameters.values() if each.name not in taken]
            parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in others]
        signature = signature.replace(parameters=parameters)
        name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                unknown = next((key for key in kwargs if key not in signature.parameters), None)
                what = str(error) if unknown is None else _no_place(unknown, signature, elsewhere or {})
                raise InvalidRequestError(f"{name}: {what}") from None
            return function(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})

        call.__signature__ = signature  # type: ignore[attr-defined]
        return cast("F", call)

    return decorate


def _no_place(unknown: str, signature: inspect.Signature, elsewhere: Mapping[str, str]) -> str:
    known = [name for name in signature.parameters if name != "self"]
    text = f"there is no argument {unknown!r}; "
    if unknown in elsewhere:
        return text + elsewhere[unknown]
    close = difflib.get_close_matches(unknown, known, 1)
    return text + (f"write {close[0]}" if close else f"it takes {', '.join(known)}")


def plain(value: Any) -> Any:
    """A scalar of numpy as Python's number, or whatever it is; everything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise InvalidRequestError unless ``value`` is one of ``kinds``, which ``wanted`` says in words."""
    if not isinstance(value, kinds):
        raise InvalidRequestError(f"{name} is {shown(value)}, of type {type(value).__name__}; it must be {wanted}")


def shown(value: object) -> str:
    """A value as a message quotes it: on one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


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
        raise InvalidRequestError(f"{name} is {shown(value)}; it must be {wanted or f'an integer {in_range}'}")
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
        os.fsencode(value)
    except UnicodeEncodeError:
        # A locale without these characters: files have names in UTF-8 there too.
        try:
            value = os.fsdecode(os.fspath(value).encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"{name} is {shown(value)}, which is no text: {error.reason}") from None
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise InvalidRequestError(
            f"{name} is {str(value)!r}, but there is no user {Path(value).parts[0]!r} here; write ./~… for a file of that name"
        ) from None
