"""A single file that appears complete or not at all: a hidden sibling is filled, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from mlx_mixtral.errors import DestinationError, DiskSpaceError
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.output.write import sync_folder

__all__ = ["FileDestination"]

MAGIC = b"GGUF"


class FileDestination:
    """Where a GGUF file goes. As a context manager it makes ``partial``, and removes it unless ``commit`` was called.

    Args:
        path: the file to make; missing folders above it are made, and removed again on failure.
        source: the folder or file exported from, which must not be touched.
        overwrite: whether a GGUF file at ``path`` may be replaced.

    Raises:
        DestinationError: ``path`` does not end in ``.gguf``, exists, lies in the source, cannot be written, or another export
            is writing it.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool = False) -> None:
        self.path = path.expanduser().resolve()
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._lock = -1
        self._committed = False
        self._made: list[Path] = []
        self._disk = next(parent for parent in self.path.parents if os.path.lexists(parent))
        self._check(source.resolve(), overwrite)

    def free_bytes(self) -> int:
        """Room on the disk the file will be on."""
        return shutil.disk_usage(self._disk).free

    def check_space(self, needed_bytes: int) -> None:
        """Raise DiskSpaceError unless ``needed_bytes`` are free."""
        if (free := self.free_bytes()) < needed_bytes:
            raise DiskSpaceError(
                f"the export needs {format_bytes(needed_bytes)} and {self._disk} has {format_bytes(free)} free; "
                "free some room, choose another destination or a smaller type"
            )

    def __enter__(self) -> Path:
        try:
            for parent in reversed([parent for parent in self.path.parents if not parent.exists()]):
                parent.mkdir()
                self._made.append(parent)
            self._lock = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise DestinationError(f"another export is writing {self.path}; wait for it or stop it") from None
        except OSError as error:
            self._remove()
            raise self._unwritable(error) from error
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def commit(self) -> None:
        """Make ``partial`` the destination, in place of a file that was there."""
        try:
            self.partial.replace(self.path)
            self._committed = True
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def _check(self, source: Path, overwrite: bool) -> None:
        if self.path == source:
            raise DestinationError(f"{self.path} is the source itself; give another destination")
        if source in self.path.parents:
            raise DestinationError(f"{self.path} lies inside the source {source}; give a destination outside it")
        if self.path.suffix.lower() != ".gguf":
            raise DestinationError(f"{self.path} is no name for a GGUF file; give one that ends in .gguf")
        if not self._disk.is_dir():
            raise DestinationError(f"{self.path} cannot be made: {self._disk} is a file, not a folder")
        if not os.path.lexists(self.path):
            return
        if not self.path.is_file():
            raise DestinationError(f"{self.path} exists and is not a file; give another destination")
        if not overwrite:
            raise DestinationError(f"{self.path} exists already; replace it with --overwrite")
        try:
            with self.path.open("rb") as file:
                magic = file.read(len(MAGIC))
        except OSError as error:
            raise self._unwritable(error) from error
        if magic != MAGIC:
            raise DestinationError(f"{self.path} exists and is not a GGUF file; give another destination")

    def _remove(self) -> None:
        """Undo what was made; only a locked partial file is ours to remove."""
        if self._lock >= 0:
            if not self._committed:
                self.partial.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1
        if not self._committed:
            for parent in reversed(self._made):
                with contextlib.suppress(OSError):
                    parent.rmdir()
            self._made.clear()

    def _unwritable(self, error: OSError) -> DestinationError:
        return DestinationError(f"{self.path} cannot be written: {error.strerror or error}; give another destination")
