"""Where a source's bytes come from: every layout reads its weight files by byte range, through a ``Storage``.

Here are files of this machine; ``remote`` has those of a hub repository, which are not downloaded. Configuration, index and
tokenizer are small and lie in a folder either way.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlx_mixtral.reading import is_there, names_like, open_descriptor, open_file, special_file
from mlx_mixtral.weights.checkpoint import close_files
from mlx_mixtral.weights.safetensors import read_into
from mlx_mixtral_convert.sources.storage.fingerprint import describe_file

__all__ = ["LocalStorage", "Storage", "StoredFile"]


class Storage(Protocol):
    """The files of one checkpoint. Weight files are named by paths that need not exist on this machine.

    Any thread may read.
    """

    path: Path
    """What the user named: a folder, a repository, or one file of either. For messages."""
    folder: Path
    """A folder of this machine with configuration, index and tokenizer."""
    named: Path | None
    """The weight file the user named, None for all there are."""
    ahead_bytes: int
    """How much of a tensor to ask for where a little is needed: what makes up for a request's latency, 0 for none."""

    def glob(self, pattern: str) -> list[Path]:
        """Files whose name matches, in order of name: all weight files there are, and maybe others."""
        ...

    def at(self, name: str) -> Path:
        """The path of a file by its name."""
        ...

    def has(self, name: str) -> bool: ...

    def look(self, file: Path) -> tuple[int, int]:
        """Bytes of a file, and a number that changes when it is written to. Raises OSError."""
        ...

    def open(self, file: Path) -> BinaryIO:
        """A file to read heads from. Raises OSError."""
        ...

    def read_into(self, file: Path, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes, writable) from ``offset`` of a file.

        Raises:
            CheckpointError: the file is too short, or cannot be read.
            HubError: it cannot be fetched.
        """
        ...

    def describe(self, file: Path) -> dict[str, Any]:
        """Bytes, and sha256 or fingerprint: the same for a file wherever it lies."""
        ...

    def stop(self) -> None:
        """Reads that wait for something, such as a network, end soon with an error."""
        ...

    def close(self) -> None: ...


class LocalStorage:
    """A folder of this machine, or one file."""

    ahead_bytes = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.named = path if path.is_file() else None
        self.folder = path.parent if self.named else path
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, close_files, self._descriptors)
        self._lock = threading.Lock()

    def glob(self, pattern: str) -> list[Path]:
        return names_like(self.folder, pattern)

    def at(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return is_there(self.folder / name)

    def look(self, file: Path) -> tuple[int, int]:
        status = file.stat()
        if (kind := special_file(status.st_mode)) is not None:
            raise OSError(errno.EINVAL, f"it is {kind}, not a file")
        return status.st_size, status.st_mtime_ns

    def open(self, file: Path) -> BinaryIO:
        return open_file(file)

    def read_into(self, file: Path, buffer: memoryview, offset: int) -> None:
        # Kept open: what is read is what was checked, even if another file takes its place.
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = open_descriptor(file)
            descriptor = self._descriptors[file]
        read_into(descriptor, buffer, offset, str(file))

    def describe(self, file: Path) -> dict[str, Any]:
        return describe_file(file)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            close_files(self._descriptors)


class StoredFile(io.RawIOBase):
    """A file of a storage as Python's file objects are; one ``read_into`` each time its reader's buffer is filled."""

    def __init__(self, storage: Storage, file: Path) -> None:
        self._storage, self._file, self._at = storage, file, 0
        self._size = storage.look(file)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError(f"a file has no byte {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if target:
            self._storage.read_into(self._file, target, self._at)
        self._at += len(target)
        return len(target)
