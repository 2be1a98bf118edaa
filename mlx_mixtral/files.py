"""Files that are written whole or not at all, and refused before the work that makes them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError

__all__ = ["check_destination", "explained", "partial_path", "replace_file"]


def check_destination(name: str, path: str | Path) -> Path:
    """The path of a file to write, refused before the work that makes it.

    Raises:
        InvalidRequestError, DestinationError: an empty name, a folder, a folder that is not there or not writable.
    """
    if not str(path):
        raise InvalidRequestError(f"{name} is an empty name; give a file")
    place = as_path(name, path)
    with explained(place):
        if place.is_dir():
            raise DestinationError(f"{place} is a folder; give a file")
        if not place.parent.is_dir():
            raise DestinationError(f"{place} cannot be written: there is no folder {place.parent}; make it first")
        if not os.access(place.parent, os.W_OK):
            raise DestinationError(f"{place} cannot be written: folder {place.parent} is not writable")
    return place


def partial_path(place: Path) -> Path:
    """The hidden file beside ``place`` that becomes it."""
    return place.with_name(f".{place.name}.partial")


def replace_file(place: Path, data: bytes) -> None:
    """Write ``data`` beside ``place`` and rename it when it is on the disk.

    Raises:
        DiskSpaceError, DestinationError: it cannot be written.
    """
    partial = partial_path(place)
    try:
        with explained(place):
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Failures to write ``place`` in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f"the disk is full: {place} cannot be written; free some room") from error
        raise DestinationError(f"{place} cannot be written: {error.strerror or error}; choose another place") from error
