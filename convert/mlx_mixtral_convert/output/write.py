"""Writing one safetensors file whose header is known first: pieces go in place, in any order, hashed as they come."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import DestinationError, DiskSpaceError
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.output.plan import ShardPlan

__all__ = ["ShardWriter", "explain", "sync_folder", "write_file"]

READ_BACK_BYTES = 8 * 2**20


class ShardWriter:
    """Writes the tensors of ``shard`` into ``folder``, piece by piece.

    Packed weights, scales and biases of an expert belong to three places of the file, so a piece may lie ahead of what has
    been hashed: it is read back, from the page cache, when its turn comes. Nothing is held in memory.

    Raises:
        DiskSpaceError: the disk is full.
        DestinationError: any other failure to write.
    """

    def __init__(self, folder: Path, shard: ShardPlan) -> None:
        self.shard, self.path = shard, folder / shard.file
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._written = 0
        self._ahead: dict[int, int] = {}
        self._filled = dict.fromkeys(shard.tensors, 0)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise explain(error, self.path, 0, shard.nbytes) from error
        try:
            self._put(0, memoryview(shard.header))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write the next values of tensor ``name``, after those already written; ``array`` is contiguous."""
        tensor, filled = self.shard.tensors[name], self._filled[name]
        data = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        assert filled + len(data) <= tensor.nbytes, f"{name}: {filled + len(data)} of {tensor.nbytes} bytes"
        self._filled[name] = filled + len(data)
        self._put(tensor.offset + filled, data)

    def finish(self) -> str:
        """Flush to the disk, close, and return the sha256 of the whole file as hex digits."""
        assert self._hashed == self._written == self.shard.nbytes, f"{self.path.name} is incomplete"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise explain(error, self.path, self._written, self.shard.nbytes) from error
        os.close(self._descriptor)
        self._descriptor = -1
        return self._hash.hexdigest()

    def _put(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                raise explain(error, self.path, self._written + done, self.shard.nbytes) from error
        self._written += len(data)
        if offset == self._hashed:
            self._hash.update(data)
            self._hashed += len(data)
        else:
            self._ahead[offset] = len(data)
        while (count := self._ahead.pop(self._hashed, 0)) > 0:
            self._read_back(count)

    def _read_back(self, count: int) -> None:
        end = self._hashed + count
        while self._hashed < end:
            try:
                data = os.pread(self._descriptor, min(READ_BACK_BYTES, end - self._hashed), self._hashed)
            except OSError as error:
                raise explain(error, self.path, self._written, self.shard.nbytes) from error
            if not data:
                raise DestinationError(f"{self.path} was cut short by someone else while it was written")
            self._hash.update(data)
            self._hashed += len(data)


def write_file(path: Path, data: bytes) -> str:
    """Write a small file, flush it to the disk, and return its sha256.

    Raises:
        DiskSpaceError: the disk is full.
        DestinationError: any other failure to write.
    """
    done = 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            while done < len(data):
                done += os.write(descriptor, memoryview(data)[done:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explain(error, path, done, len(data)) from error
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain(error: OSError, path: Path, done: int, total: int) -> DestinationError | DiskSpaceError:
    """A failure to write ``path``, of which ``done`` bytes of ``total`` were written, in one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        got = f"got {format_bytes(done)} of its {format_bytes(total)}" if total else "cannot grow"
        return DiskSpaceError(f"the disk is full: {path.name} {got}; free some room or choose another destination")
    return DestinationError(f"{path} cannot be written: {error.strerror or error}; choose another destination")
