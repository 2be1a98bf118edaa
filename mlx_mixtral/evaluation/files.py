"""Files of an evaluation: whole or not at all, and what a file or checkpoint is, without reading all of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.manifest import MANIFEST, file_sha256

__all__ = ["check_destination", "checkpoint_identity", "explained", "file_identity", "partial_path", "replace_file"]

WHOLE_BYTES, STRIDE_BYTES, SAMPLE_BYTES = 16 * 2**20, 16 * 2**20, 4096


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


def checkpoint_identity(folder: Path) -> str:
    """Tells one checkpoint from another, wherever it lies: sha256 of its configuration and of what its weights are.

    The manifest of a conversion says that by itself; of other weights each file's size and samples are taken.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        names = [name for name in ("config.json", MANIFEST) if (folder / name).is_file()]
        for name in names:
            digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
        if MANIFEST not in names:
            for file in Checkpoint(folder).files:
                digest.update(f"{file.name} {file_identity(file)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """sha256 of a file; of a large one of its size, its first 16 MiB and 4 KiB of every further 16 MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(WHOLE_BYTES))
        for offset in [*range(STRIDE_BYTES, size - SAMPLE_BYTES, STRIDE_BYTES), max(0, size - SAMPLE_BYTES)]:
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
