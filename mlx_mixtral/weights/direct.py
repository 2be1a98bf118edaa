"""Reading experts past the page cache, from files that must not change meanwhile.

What is streamed again and again would fill the page cache with a second copy of the weights. macOS leaves a file out of it at
a word (``F_NOCACHE``) and still reads to any address. Linux does with ``O_DIRECT``, but only from whole blocks to aligned
memory: reads that are not (tensors of foreign files, arrays of MLX's CPU backend) go through an aligned buffer a thread and
are copied. Where a file system refuses direct reads, they are cached ones, and the kernel is told to drop what was read.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader, close_files
from mlx_mixtral.weights.safetensors import TensorInfo, read_into

__all__ = ["ExpertFileReader", "Identity", "identities"]

BLOCK_BYTES = 4096
# One read: as large as the pieces that are asked for, and the blocks its ends lie in.
BOUNCE_BYTES = 4 * 2**20 + 2 * BLOCK_BYTES
_F_NOCACHE = 48  # macOS fcntl.h; Python does not name it on other systems


@dataclass(frozen=True)
class Identity:
    """What tells a file from another one, or from itself after a change."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def identities(checkpoint: Checkpoint) -> dict[Path, Identity]:
    """What the weight files of a checkpoint are now.

    Raises:
        CheckpointError: one is gone.
    """
    try:
        return {file: Identity.of(file.stat()) for file in checkpoint.files}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from error


class ExpertFileReader(CheckpointReader):
    """Open weight files of a checkpoint for reading experts while generating; any number of threads may read.

    Args:
        known: what the files were when the model was loaded.
        page_cache: read through the page cache after all: faster where the machine has memory to spare beyond the budget.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, checkpoint: Checkpoint, known: Mapping[Path, Identity], *, page_cache: bool = False) -> None:
        super().__init__(checkpoint)
        self.page_cache = page_cache
        self._known = known
        for file, opened in self._descriptors.items():
            if Identity.of(os.fstat(opened)) != known[file]:
                self.close()
                self.check_unchanged(file)
        self._direct: dict[Path, int] = {}
        weakref.finalize(self, close_files, self._direct)
        self._local = threading.local()
        if not page_cache:
            self._avoid_cache()

    def close(self) -> None:
        close_files(getattr(self, "_direct", {}))
        super().close()

    def check_unchanged(self, file: Path) -> None:
        """Raise CheckpointError unless ``file`` is still the one that was opened: same inode, size and time of change.

        It may come back: nothing is remembered of a failure.
        """
        try:
            found = Identity.of(file.stat())
        except OSError as error:
            raise CheckpointError(
                f"{file} is no longer there, but experts are read from it ({error.strerror or error}); put it "
                "back, or load again"
            ) from error
        known = self._known[file]
        if found == known:
            return
        what = "was replaced"
        if found.nbytes != known.nbytes:
            what = f"has {found.nbytes} bytes, but had {known.nbytes}"
        elif found.inode == known.inode:
            what = "was modified"
        raise CheckpointError(f"{file} {what} since the model was loaded; put the file back, or load the model again")

    def read(self, info: TensorInfo, buffer: memoryview, skip_bytes: int = 0) -> None:
        what = f"{info.file}: tensor {info.name!r}"
        offset = info.offset + skip_bytes
        if (descriptor := self._direct.get(info.file)) is not None:
            self._read_direct(descriptor, buffer.cast("B"), offset, what)
            return
        descriptor = self._descriptors[info.file]
        read_into(descriptor, buffer, offset, what)
        if not self.page_cache and sys.platform == "linux":
            os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def _avoid_cache(self) -> None:
        for file, descriptor in self._descriptors.items():
            if sys.platform == "darwin":
                fcntl.fcntl(descriptor, _F_NOCACHE, 1)
            elif hasattr(os, "O_DIRECT"):
                try:
                    self._direct[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
                except OSError:  # tmpfs and some network file systems
                    continue

    def _read_direct(self, descriptor: int, buffer: memoryview, offset: int, what: str) -> None:
        target = np.frombuffer(buffer, np.uint8)
        if not (offset | len(target) | target.ctypes.data) % BLOCK_BYTES:
            read_into(descriptor, buffer, offset, what)
            return
        bounce = self._bounce()
        view, done = memoryview(bounce), 0  # type: ignore[arg-type]
        while done < len(target):
            start = (offset + done) // BLOCK_BYTES * BLOCK_BYTES
            skip = offset + done - start
            wanted = min(len(target) - done, BOUNCE_BYTES - skip)
            whole = -(-(skip + wanted) // BLOCK_BYTES) * BLOCK_BYTES
            try:
                count = os.preadv(descriptor, [view[:whole]], start)
            except OSError as error:
                raise CheckpointError(f"{what} cannot be read: {error.strerror or error}") from error
            # The last block of a file is shorter than a block.
            usable = min(count - skip, wanted)
            if usable <= 0:
                raise CheckpointError(f"{what} ends {len(target) - done} bytes early; the file was truncated")
            # numpy copies without the interpreter's lock.
            np.copyto(target[done : done + usable], bounce[skip : skip + usable])
            done += usable

    def _bounce(self) -> npt.NDArray[np.uint8]:
        """Aligned memory of this thread."""
        if not hasattr(self._local, "bounce"):
            self._local.bounce = np.frombuffer(mmap.mmap(-1, BOUNCE_BYTES), np.uint8)
        bounce: npt.NDArray[np.uint8] = self._local.bounce
        return bounce
