"""Files that are written whole or not at all, and refused before the work that makes them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError

__all__ = ["check_destination", "check_folder", "explained", "partial_path", "replace_file", "write_folder"]


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


def check_folder(name: str, path: str | Path, *, overwrite: bool, holds: Iterable[str]) -> Path:
    """The path of a folder to make, links resolved, refused before the work that fills it.

    Args:
        overwrite: whether a folder that is there may be replaced: one that has nothing but ``holds`` in it.

    Raises:
        InvalidRequestError, DestinationError: an empty name, something that is there, a folder that cannot be made.
    """
    if not str(path):
        raise InvalidRequestError(f"{name} is an empty name; give a folder")
    with explained(given := as_path(name, path)):
        place = given.resolve()
        if os.path.lexists(place):
            if not place.is_dir():
                raise DestinationError(f"{given} exists and is a file; give a folder")
            if not overwrite:
                raise DestinationError(f"{given} exists; give another folder, or --overwrite to replace it")
            others = sorted({entry.name for entry in place.iterdir()} - {*holds, ".DS_Store"})
            if others:
                raise DestinationError(f"{given} holds {others[0]}, which is not ours to replace; give another folder")
        if not place.parent.is_dir():
            raise DestinationError(f"{given} cannot be made: there is no folder {place.parent}; make it first")
        if not os.access(place.parent, os.W_OK):
            raise DestinationError(f"{given} cannot be made: folder {place.parent} is not writable")
    return place


def write_folder(place: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder of ``files`` by their paths in it, whole or not at all: a hidden one beside it is filled, then renamed.

    A folder that is there is replaced, and goes when the new one is in its place.

    Raises:
        DiskSpaceError, DestinationError: it cannot be written.
    """
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        with explained(place):
            partial.mkdir()
            for name, data in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                with (partial / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            replaces = place.is_dir()
            if replaces:
                place.rename(old)
            try:
                partial.rename(place)
            except BaseException:
                if replaces:
                    old.rename(place)
                raise
            if replaces:
                shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
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
