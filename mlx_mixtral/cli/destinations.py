"""Files that a command writes, refused before the work that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.files import check_destination, is_special

__all__ = ["check_destinations", "journal_path"]


def check_destinations(places: Mapping[str, str | None]) -> dict[str, Path]:
    """The paths of those that are given, by their options.

    Raises:
        InvalidRequestError, DestinationError: one that cannot be written, or two that are one file.
    """
    found = {name: check_destination(name, path) for name, path in places.items() if path is not None}
    if len(set(found.values())) < len(found):
        raise InvalidRequestError(f"{', '.join(found)} name one file; give each its own")
    return found


def journal_path(places: Mapping[str, Path]) -> Path | None:
    """The journal of a run: ``--resume``, or beside ``--output``; None without both."""
    output = places.get("--output")
    if output is not None and is_special(output):
        output = None
    beside = None if output is None else output.with_name(f"{output.name}.journal")
    return places.get("--resume", beside)
