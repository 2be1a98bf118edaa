"""Files that a command writes, refused before the work that makes them.

One rule for all of them: a file that is not of the kind that is written is never replaced, and one that is only with
``--overwrite``, or after a question on a terminal. Devices and pipes are written to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import click

from mlx_mixtral.errors import DestinationError, InvalidRequestError, MixtralError
from mlx_mixtral.files import check_destination, check_kind, is_special
from mlx_mixtral.reading import open_file, read_json

__all__ = [
    "CONVERSATION", "EVALUATION", "PAGE", "PLOT", "PROMPT", "TRACE", "FileKind", "ask_to_replace",
    "check_destinations", "check_place", "journal_path",
]  # fmt: skip

BEGINNING_BYTES = 2**16


class FileKind(NamedTuple):
    """What a command writes: what it is called, and whether a file is one."""

    name: str
    is_one: Callable[[Path], bool]


def check_destinations(
    places: Mapping[str, str | None], kinds: Mapping[str, FileKind] | None = None, *, overwrite: bool = False
) -> dict[str, Path]:
    """The paths of those that are given, by their options.

    Args:
        kinds: what is written to each; one without a kind looks after what is there itself.

    Raises:
        InvalidRequestError, DestinationError: one that cannot be written or must not be replaced, or two that are one file.
    """
    found = {name: check_destination(name, path) for name, path in places.items() if path is not None}
    files = [place for place in found.values() if not is_special(place)]
    if len(set(files)) < len(files):
        raise InvalidRequestError(f"{', '.join(found)} name the same file; give each its own")
    for name, kind in (kinds or {}).items():
        if name in found:
            check_kind(found[name], *kind)
            ask_to_replace(found[name], overwrite=overwrite)
    return found


def check_place(
    name: str, path: str | Path, kind: FileKind, *, overwrite: bool, ask: Callable[[str], bool] | None = None
) -> Path:
    """The path of one file to write.

    Args:
        ask: puts a question to the user, for True or False; as a rule on the terminal, where there is one.

    Raises:
        InvalidRequestError, DestinationError: it cannot be written, or what is there must not be replaced.
    """
    place = check_destination(name, path)
    check_kind(place, *kind)
    ask_to_replace(place, overwrite=overwrite, ask=ask)
    return place


def ask_to_replace(place: Path, *, overwrite: bool, ask: Callable[[str], bool] | None = None) -> None:
    """Raise DestinationError for a file that is there, unless the user wants it replaced."""
    if overwrite or is_special(place) or not place.exists():
        return
    if (ask or _confirm)(f"{place} exists; replace it?"):
        return
    raise DestinationError(f"{place} exists; give another name, or use --overwrite to replace it")


def _confirm(question: str) -> bool:
    """The answer on the terminal; no where there is none, and for Ctrl-C and Ctrl-D."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False


def journal_path(places: Mapping[str, Path]) -> Path | None:
    """The journal of a run: ``--resume``, or beside ``--output``; None without both."""
    output = places.get("--output")
    if output is not None and is_special(output):
        output = None
    beside = None if output is None else output.with_name(f"{output.name}.journal")
    return places.get("--resume", beside)


def _begins(place: Path, *marks: bytes) -> bool:
    """Whether a file begins with the first of ``marks`` and has the others near its beginning."""
    with open_file(place) as file:
        head = file.read(BEGINNING_BYTES)
    return head.startswith(marks[0]) and all(mark in head for mark in marks)


def _is_evaluation(place: Path) -> bool:
    try:
        found = read_json(place)
    except MixtralError:
        return False
    return isinstance(found.get("model"), str) and any(key in found for key in ("domains", "passkey", "tasks"))


def _is_prompt(place: Path) -> bool:
    from mlx_mixtral.runtime.saved_prompt import is_saved_prompt

    return is_saved_prompt(place)


def _is_trace(place: Path) -> bool:
    from mlx_mixtral.experts.trace import is_trace

    return is_trace(place)


def _is_conversation(place: Path) -> bool:
    from mlx_mixtral.cli.chat.conversation import is_conversation

    return is_conversation(place)


CONVERSATION = FileKind("a saved conversation", _is_conversation)
EVALUATION = FileKind("a result written by evaluate", _is_evaluation)
PAGE = FileKind(
    "a page written by routing", lambda place: _begins(place, b"<!doctype html>", b"the routing analysis of")
)
PLOT = FileKind("a PNG", lambda place: _begins(place, b"\x89PNG\r\n\x1a\n"))
PROMPT = FileKind("a saved prompt", _is_prompt)
TRACE = FileKind("a routing trace", _is_trace)
