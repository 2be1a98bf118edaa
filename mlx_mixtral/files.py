"""Files that are written whole or not at all, and refused before the work that makes them; small JSON files read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.leftovers import lock, remove_leftovers
from mlx_mixtral.reading import is_there, open_file, parse_json, special_file
from mlx_mixtral.sizes import format_bytes

__all__ = [
    "Journal", "atomic_write", "check_destination", "check_folder", "check_kind", "disk_error", "disk_errors",
    "is_special", "open_partial", "partial_path", "put_in_place", "replace_file",
    "swap_folder", "sync_folder", "write_folder",
]  # fmt: skip

JOURNAL_VERSION = 1
MAX_LINE_BYTES = 2**28


def check_destination(name: str, path: str | Path, *, regular: bool = False) -> Path:
    """The path of a file to write, links followed, refused before the work that makes it.

    Args:
        regular: whether a device or a pipe, which ``atomic_write`` writes through to, is refused too.

    Raises:
        InvalidRequestError, DestinationError: an empty name, a folder, something that cannot be written to, a folder that is
            not there or not writable.
    """
    if not str(path):
        raise InvalidRequestError(f"{name} has an empty name; give a file")
    with disk_errors(given := as_path(name, path)):
        place = _place(given)
        if is_special(place):
            if regular:
                raise DestinationError(f"{given} is {_kind(place)}, not a file; give a file")
            if not os.access(place, os.W_OK):
                raise DestinationError(f"{given} cannot be written: permission denied")
            return place
        _check_parent(place, f"{place} cannot be written")
        # Permissions do not tell everything: some file systems take no new files.
        tempfile.TemporaryFile(dir=place.parent).close()
    return place


def check_kind(place: Path, name: str, is_one: Callable[[Path], bool]) -> None:
    """Raise DestinationError for a file that is there and is something else than what is to be written."""
    if place.exists() and not is_special(place) and not is_one(place):
        raise DestinationError(f"{place} exists and is not {name}; give another name")


def is_special(place: Path) -> bool:
    """Whether a place is a device or a pipe, or stands for an open file as /dev/stdout does: written to, never replaced."""
    return _open_descriptor(place) is not None or (place.exists() and not place.is_file())


def _place(path: Path) -> Path:
    """Where a file for ``path`` is to be written: what links lead to, a regular file or nothing yet, or the path of a device.

    Raises:
        OSError, DestinationError: links that lead back to themselves; a folder, a disk or a socket.
    """
    if _open_descriptor(path) is not None:
        return path
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise DestinationError(f"{path} is a folder; give a file")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise DestinationError(f"{path} is {special_file(mode)}, which cannot be written to; give a file")
    return Path(os.path.realpath(path))


def _kind(place: Path) -> str:
    return special_file(place.stat().st_mode) or "the name of an open file"


def _open_descriptor(path: Path) -> int | None:
    """The descriptor that a path such as /dev/stdout or /proc/self/fd/1 stands for, links followed by their names alone."""
    name = os.path.abspath(path)  # noqa: PTH100
    for _ in range(40):
        if (
            found := re.fullmatch(rf"/(?:dev|proc/(?:self|thread-self|{os.getpid()}))/fd/(\d{{1,9}})", name)
        ) is not None:
            return int(found[1])
        if not os.path.islink(name):  # noqa: PTH114
            return None
        name = os.path.normpath(Path(name).parent / Path(name).readlink())
    return None


def partial_path(place: Path) -> Path:
    """The hidden file beside ``place`` that becomes it."""
    return place.with_name(f".{place.name}.partial")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill, which becomes ``path`` when the block ends well: whole, and on the disk. Else nothing is left.

    What a link leads to is replaced, and the link stays. A device or a pipe gets the bytes when the block has ended, and stays.
    What an earlier process that was killed left of the same file is removed.

    Raises:
        DiskSpaceError, DestinationError: it cannot be written. Any OSError of the block counts as that.
    """
    with disk_errors(path):
        place = _place(path)
        if is_special(place):
            with tempfile.TemporaryFile() as held:
                yield held
                held.seek(0)
                with _written_through(place) as out:
                    shutil.copyfileobj(held, out)
            return
        # Short and of a fixed form: the file's own name may be as long as names can be.
        start = f".{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}."
        remove_leftovers(place.parent, start, ".partial")
        partial = place.with_name(f"{start}{os.getpid()}.partial")
        try:
            with open_partial(partial) as file:
                yield file
                file.flush()
                put_in_place(partial, place)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def open_partial(path: Path) -> BinaryIO:
    """A new file in place of one that was there, locked so that no other process takes it for left behind. Raises OSError."""
    path.unlink(missing_ok=True)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "wb")
    lock(file.fileno())
    return file


def _written_through(place: Path) -> BinaryIO:
    """A device, a pipe or an open file to write to. Opening a pipe waits for its reader, as the shell does."""
    descriptor = _open_descriptor(place)
    return os.fdopen(os.open(place, os.O_WRONLY) if descriptor is None else os.dup(descriptor), "wb")


def put_in_place(partial: Path, place: Path) -> None:
    """A file that is whole becomes ``place``, its bytes on the disk before its name. Raises OSError."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(place)
    sync_folder(place.parent)


def replace_file(path: Path, data: bytes) -> None:
    """``atomic_write`` of bytes that are there already."""
    with atomic_write(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(name: str, path: str | Path, *, overwrite: bool, holds: Iterable[str]) -> Path:
    """The path of a folder to make, links resolved, refused before the work that fills it.

    Args:
        overwrite: whether a folder that is there may be replaced: one that has nothing but ``holds`` in it.

    Raises:
        InvalidRequestError, DestinationError: an empty name, something that is there, a folder that cannot be made.
    """
    if not str(path):
        raise InvalidRequestError(f"{name} has an empty name; give a folder")
    with disk_errors(given := as_path(name, path)):
        place = given.resolve()
        if os.path.lexists(place):
            if not place.is_dir():
                raise DestinationError(f"{given} exists and is a file; give a folder")
            if not overwrite:
                raise DestinationError(f"{given} exists; give another folder, or use --overwrite to replace it")
            others = sorted({entry.name for entry in place.iterdir()} - {*holds, ".DS_Store"})
            if others:
                raise DestinationError(
                    f"{given} holds {others[0]}, which this program did not write; give another folder"
                )
        _check_parent(place, f"{given} cannot be made")
    return place


def _check_parent(place: Path, problem: str) -> None:
    if not place.parent.is_dir():
        raise DestinationError(f"{problem}: there is no folder {place.parent}; create it first")
    if not os.access(place.parent, os.W_OK):
        raise DestinationError(f"{problem}: folder {place.parent} is not writable")


def write_folder(place: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder of ``files`` by their paths in it, whole or not at all: a hidden one beside it is filled, then renamed.

    A folder that is there is replaced, and goes when the new one is in its place.

    Raises:
        DiskSpaceError, DestinationError: it cannot be written.
    """
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        with disk_errors(place):
            remove_leftovers(place.parent, f".{place.name}.", ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                lock(descriptor)
                for name, data in files.items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    replace_file(partial / name, data)
                swap_folder(partial, place, old)
            finally:
                os.close(descriptor)
            shutil.rmtree(old, ignore_errors=True)
            remove_leftovers(place.parent, f".{place.name}.", ".old")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def swap_folder(new: Path, place: Path, old: Path) -> None:
    """Rename ``new`` to ``place``. A folder that is there becomes ``old``, or comes back if that fails. Raises OSError."""
    replaces = place.is_dir() and any(place.iterdir())
    if replaces:
        place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        if replaces:
            old.rename(place)
        raise


class Journal:
    """What an unfinished job has done: a file of JSON lines that is only appended to. The first says which job it is:

        {"journal": 1, "identity": {…}}

    A line is on the disk before the next one is begun. A line that was cut off ends the journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Any, list[dict[str, Any]]] | None:
        """The identity and the lines of an earlier run, None for a file that is absent or no journal.

        Raises:
            CheckpointError: something else than a file, or it cannot be read.
            OSError: reading fails.
        """
        entries: list[dict[str, Any]] = []
        if not is_there(self.path):
            return None
        with open_file(self.path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                try:
                    entry = parse_json(self.path, line)
                except CheckpointError:
                    break
                if not line.endswith(b"\n"):
                    break
                entries.append(entry)
        if not entries or entries[0].get("journal") != JOURNAL_VERSION:
            return None
        return entries[0].get("identity"), entries[1:]

    def start(self, identity: Any, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write it again, in place of what was there.

        Raises:
            DiskSpaceError, DestinationError: it cannot be written.
        """
        replace_file(self.path, _json_lines({"journal": JOURNAL_VERSION, "identity": identity}, *lines))

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Add lines, and wait until they are on the disk. After a failure, which may tear one, nothing must be added.

        Raises:
            DiskSpaceError, DestinationError: it cannot be written.
        """
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(_json_lines(*lines))
            file.flush()
            os.fsync(file.fileno())


def _json_lines(*entries: Mapping[str, Any]) -> bytes:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Failures to write ``place`` inside become one line.

    Raises:
        DiskSpaceError: the disk is full.
        DestinationError: any other OSError.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, place) from error


def disk_error(
    error: OSError, place: Path, done_bytes: int = 0, total_bytes: int = 0
) -> DestinationError | DiskSpaceError:
    """A failure to write ``place`` in one line; of how much was written, where ``total_bytes`` are known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        got = f"{place.name} got {format_bytes(done_bytes)} of its {format_bytes(total_bytes)}"
        what = got if total_bytes else f"{place} cannot be written"
        return DiskSpaceError(f"the disk is full: {what}; free some space or give another destination")
    return DestinationError(f"{place} cannot be written: {error.strerror or error}; give another destination")
