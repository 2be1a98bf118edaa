"""Writing one safetensors file whose header is known first: pieces go in place, in any order, hashed as they come."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import DestinationError
from mlx_mixtral.files import disk_error, disk_errors
from mlx_mixtral_convert.output.plan import ShardPlan

__all__ = ["ShardWriter"]

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
        with disk_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        try:
            self._put(0, memoryview(shard.header))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
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
        with disk_errors(self.path):
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        return self._hash.hexdigest()

    def _put(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                raise disk_error(error, self.path, self._written + done, self.shard.nbytes) from error
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
            with disk_errors(self.path):
                data = os.pread(self._descriptor, min(READ_BACK_BYTES, end - self._hashed), self._hashed)
            if not data:
                raise DestinationError(f"{self.path} was truncated by another program while it was being written")
            self._hash.update(data)
            self._hashed += len(data)
