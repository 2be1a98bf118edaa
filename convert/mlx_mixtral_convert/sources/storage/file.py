"""Safetensors of a ``Storage``: the same checkpoint and reader as the runtime's, whatever the bytes come from."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import POINTER_FIX, is_pointer
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.safetensors import TensorInfo, header_bytes, parse_header
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["StoredCheckpoint", "StoredReader", "StoredTensor", "head_of", "read_header", "refuse_pointer"]

HEAD_BYTES = 64
# Tensors read in turn: the fields of a packed module.
WINDOWS = 4


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor whose bytes hold each matrix of ``shape`` as it is or, when ``transposed``, column by column."""

    transposed: bool = False


def read_header(storage: Storage, file: Path) -> dict[str, TensorInfo]:
    """Names, shapes, dtypes and byte ranges of every tensor of a file.

    Raises:
        CheckpointError: as the runtime's ``read_header``.
    """
    try:
        with storage.open(file) as opened:
            size = storage.look(file)[0]
            raw = opened.read(header_bytes(file, opened.read(8), size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return parse_header(file, raw, size)


def head_of(storage: Storage, file: Path) -> bytes:
    """The first bytes of a file, at most ``HEAD_BYTES``; what cannot be read is empty."""
    try:
        head = bytearray(min(storage.look(file)[0], HEAD_BYTES))
        storage.read_into(file, memoryview(head), 0)
    except (OSError, CheckpointError):
        return b""
    return bytes(head)


def refuse_pointer(storage: Storage, file: Path) -> None:
    """Raise CheckpointError for a file that git-lfs put in the place of another."""
    if is_pointer(head_of(storage, file)):
        raise CheckpointError(f"{file} {POINTER_FIX}")


class StoredCheckpoint(Checkpoint):
    """The safetensors of a storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.folder = storage, storage.path
        self._tensors = self._open(storage.folder)

    def _has(self, file: str) -> bool:
        return self._storage.has(file)

    def _all_names(self) -> list[str]:
        return [file.name for file in self._storage.glob("*")]

    def _header(self, file: str) -> Mapping[str, TensorInfo]:
        return read_header(self._storage, self._storage.at(file))


class StoredReader(CheckpointReader):
    """Reads tensors of a storage; rows a part at a time, where a request takes long, from more that is fetched at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._windows: dict[tuple[Path, str], tuple[int, npt.NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, buffer: memoryview, skip_bytes: int = 0) -> None:
        self._storage.read_into(info.file, buffer.cast("B"), info.offset + skip_bytes)

    def rows(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        begin, end = start * info.row_bytes, stop * info.row_bytes
        if end - begin >= min(self._storage.ahead_bytes, info.nbytes):
            return super().rows(info, start, stop)
        with self._lock:
            at, held = self._windows.pop((info.file, info.name), (begin, np.empty(0, np.uint8)))
            if not at <= begin <= end <= at + len(held):
                at, held = begin, self._fetch(info, begin, held[begin - at :] if begin >= at else held[:0])
            self._windows[info.file, info.name] = at, held
            while len(self._windows) > WINDOWS:
                del self._windows[next(iter(self._windows))]
        return held[begin - at : end - at].reshape(stop - start, -1).copy()

    def close(self) -> None:
        self._storage.close()

    def _fetch(self, info: TensorInfo, begin: int, known: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Bytes of a tensor from ``begin`` on, of which the first are known."""
        fetched = np.empty(min(self._storage.ahead_bytes, info.nbytes - begin), np.uint8)
        fetched[: len(known)] = known
        self.read(info, fetched[len(known) :].data, begin + len(known))
        return fetched
