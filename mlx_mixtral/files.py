"""Files that are written whole or not at all, and refused before the work that makes them; small JSON files read."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.sizes import format_bytes

__all__ = [
    "POINTER_FIX", "Journal", "atomic_write", "check_destination", "check_folder", "disk_error", "disk_errors", "is_pointer",
    "parse_json", "partial_path", "put_in_place", "read_json", "replace_file", "swap_folder", "sync_folder", "write_folder",
]  # fmt: skip

MAX_JSON_BYTES = 256 * 2**20
# What editors of Windows put in front of a text.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_FIX = (
    "is a git-lfs pointer, a few lines that stand for a file which is not here; run git lfs pull in its folder"
)
"""What to say about a file that ``is_pointer`` finds, after its name."""
JOURNAL_VERSION = 1


def check_destination(name: str, path: str | Path) -> Path:
    """The path of a file to write, refused before the work that makes it.

    Raises:
        InvalidRequestError, DestinationError: an empty name, a folder, a folder that is not there or not writable.
    """
    if not str(path):
        raise InvalidRequestError(f"{name} is an empty name; give a file")
    place = as_path(name, path)
    with disk_errors(place):
        if place.is_dir():
            raise DestinationError(f"{place} is a folder; give a file")
        _check_parent(place, f"{place} cannot be written")
        # Permissions do not tell everything: some file systems take no new files.
        tempfile.TemporaryFile(dir=place.parent).close()
    return place


def partial_path(place: Path) -> Path:
    """The hidden file beside ``place`` that becomes it."""
    return place.with_name(f".{place.name}.partial")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill, which becomes ``path`` when the block ends well: whole, and on the disk. Else nothing is left.

    What a link leads to is replaced, and the link stays.

    Raises:
        DiskSpaceError, DestinationError: it cannot be written. Any OSError of the block counts as that.
    """
    with disk_errors(path):
        place = Path(os.path.realpath(path))
        # Short and of a fixed form: the file's own name may be as long as names can be.
        partial = place.with_name(f".{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                yield file
            put_in_place(partial, place)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


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
        raise InvalidRequestError(f"{name} is an empty name; give a folder")
    with disk_errors(given := as_path(name, path)):
        place = given.resolve()
        if os.path.lexists(place):
            if not place.is_dir():
                raise DestinationError(f"{given} exists and is a file; give a folder")
            if not overwrite:
                raise DestinationError(f"{given} exists; give another folder, or --overwrite to replace it")
            others = sorted({entry.name for entry in place.iterdir()} - {*holds, ".DS_Store"})
            if others:
                raise DestinationError(f"{given} holds {others[0]}, which is not ours to replace; give another folder")
        _check_parent(place, f"{given} cannot be made")
    return place


def _check_parent(place: Path, problem: str) -> None:
    if not place.parent.is_dir():
        raise DestinationError(f"{problem}: there is no folder {place.parent}; make it first")
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
            partial.mkdir()
            for name, data in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(partial / name, data)
            swap_folder(partial, place, old)
            shutil.rmtree(old, ignore_errors=True)
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
        """The identity and the lines of an earlier run, None for a file that is absent or no journal. Raises OSError."""
        entries: list[dict[str, Any]] = []
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        for line in raw.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
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
        return DiskSpaceError(f"the disk is full: {what}; free some room or give another destination")
    return DestinationError(f"{place} cannot be written: {error.strerror or error}; give another destination")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a small JSON object of a checkpoint folder.

    Raises:
        CheckpointError: unreadable, not text, not JSON, or not an object.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; no configuration is that large")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(path, data)


def parse_json(where: Path | str, data: bytes) -> dict[str, Any]:
    """A JSON object; ``where`` names it in errors.

    Text is UTF-8, or what a byte-order mark says.

    Raises:
        CheckpointError: not text, not JSON, not an object, or a git-lfs pointer.
    """
    if is_pointer(data):
        raise CheckpointError(f"{where} {POINTER_FIX}")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        parsed = json.loads(data.decode(encoding))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds a JSON {type(parsed).__name__}, not an object")
    return parsed


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (8 bytes at least) is git-lfs's stand-in for another one."""
    start = head[: len(_POINTER)]
    return len(start) >= 8 and _POINTER.startswith(start)
