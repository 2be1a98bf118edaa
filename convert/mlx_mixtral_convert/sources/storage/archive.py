"""Zip files of stored entries, read by byte range: where an entry's bytes lie, after its description is checked."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["ZIP_ERRORS", "data_starts", "plain_entry"]

# What zipfile raises for a file that is damaged, truncated or none.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError, ValueError)
_LOCAL_HEADER_BYTES = 30
# Where an entry begins stands before each: a thousand requests to a hub, one after another, would take minutes.
THREADS = 8


def plain_entry(path: Path, entry: zipfile.ZipInfo, limit: int | None = None) -> zipfile.ZipInfo:
    """The entry, if its bytes lie in the file as they are and number ``limit`` at most.

    Raises:
        CheckpointError: compressed, encrypted or too large.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise CheckpointError(
            f"{path}: entry {entry.filename!r} is compressed or encrypted; only entries that are stored plain are read: "
            "write the file again without compression"
        )
    if limit is not None and entry.file_size > limit:
        raise CheckpointError(f"{path}: entry {entry.filename!r} has {entry.file_size} bytes; at most {limit} are read")
    return entry


def data_starts(path: Path, storage: Storage, entries: Iterable[zipfile.ZipInfo]) -> list[int]:
    """Where the bytes of each entry begin, in order.

    Raises:
        CheckpointError: an entry is not where the directory says, or ends beyond the file.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
        return list(pool.map(lambda entry: _data_start(path, storage, entry), entries))


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
