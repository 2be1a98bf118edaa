"""Zip files of stored entries, read by byte range: where an entry's bytes lie, after its description is checked."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["ZIP_ERRORS", "data_starts", "entries_of", "open_archive", "plain_entry"]

# What zipfile raises for a file that is damaged, truncated or none.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError, ValueError)
_LOCAL_HEADER_BYTES = 30
# Where an entry begins stands before each: a thousand requests to a hub, one after another, would take minutes.
THREADS = 8
MAX_DIRECTORY_BYTES = 16 * 2**20


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """The zip file that ``file`` holds. Raises one of ``ZIP_ERRORS``."""
    return zipfile.ZipFile(cast("BinaryIO", _Bounded(file)))


class _Bounded:
    """A file of which no more is read at once than a directory of a real one has: its size is what the file says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(MAX_DIRECTORY_BYTES + 1 if count < 0 else min(count, MAX_DIRECTORY_BYTES + 1))
        if len(data) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has more than {MAX_DIRECTORY_BYTES} bytes")
        return data


def entries_of(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name.

    Raises:
        CheckpointError: two have one name.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise CheckpointError(f"{path}: two entries have the same name; the file is damaged")
    return entries


def plain_entry(path: Path, entry: zipfile.ZipInfo, limit: int | None = None) -> zipfile.ZipInfo:
    """The entry, if its bytes lie in the file as they are and number ``limit`` at most.

    Raises:
        CheckpointError: compressed, encrypted or too large.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise CheckpointError(
            f"{path}: entry {entry.filename!r} is compressed or encrypted; only uncompressed entries are "
            "supported: write the file again without compression"
        )
    if limit is not None and entry.file_size > limit:
        raise CheckpointError(f"{path}: entry {entry.filename!r} has {entry.file_size} bytes; at most {limit} are read")
    return entry


def data_starts(path: Path, storage: Storage, entries: Iterable[zipfile.ZipInfo]) -> list[int]:
    """Where the bytes of each entry begin, in order.

    Raises:
        CheckpointError: an entry is not where the directory says, ends beyond the file, or shares bytes with another.
    """
    listed = list(entries)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
        starts = list(pool.map(lambda entry: _data_start(path, storage, entry), listed))
    _refuse_overlaps(path, list(zip(starts, listed, strict=True)))
    return starts


def _refuse_overlaps(path: Path, placed: list[tuple[int, zipfile.ZipInfo]]) -> None:
    """Tensors may share a storage, as tied ones do; entries that share bytes are a directory that is wrong."""
    end, last = 0, ""
    for start, entry in sorted(placed, key=lambda pair: (pair[0], pair[1].file_size)):
        if start < end:
            raise CheckpointError(f"{path}: entries {last!r} and {entry.filename!r} share bytes; the file is damaged")
        end, last = start + entry.file_size, entry.filename


def _data_start(path: Path, storage: Storage, entry: zipfile.ZipInfo) -> int:
    head, size = bytearray(_LOCAL_HEADER_BYTES), storage.look(path)[0]
    if 0 <= entry.header_offset <= size - len(head):
        storage.read_into(path, memoryview(head), entry.header_offset)
    if head[:4] != b"PK\3\4":
        raise CheckpointError(f"{path}: entry {entry.filename!r} is not where the directory says; the file is damaged")
    name_bytes, extra_bytes = struct.unpack_from("<HH", head, 26)
    start: int = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if start + entry.file_size > size:
        raise CheckpointError(f"{path}: entry {entry.filename!r} ends beyond the file's {size} bytes; it is truncated")
    return start
