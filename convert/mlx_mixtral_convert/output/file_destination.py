"""A single GGUF file that appears complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_mixtral.errors import DestinationError
from mlx_mixtral.files import disk_errors, sync_folder
from mlx_mixtral_convert.output.destination import Destination

__all__ = ["FileDestination"]

MAGIC = b"GGUF"


class FileDestination(Destination):
    """A file whose name ends in ``.gguf``; only a GGUF file is ever replaced."""

    job, smaller = "export", "a smaller type"

    def _check(self, source: Path) -> None:
        if self.path.suffix.lower() != ".gguf":
            raise DestinationError(f"{self.path} is not a name for a GGUF file; give one that ends in .gguf")
        self._check_parent()
        if not os.path.lexists(self.path):
            return
        if not self.path.is_file():
            raise DestinationError(f"{self.path} exists and is not a file; give another destination")
        if not self._overwrite:
            raise DestinationError(f"{self.path} already exists; replace it with --overwrite")
        with disk_errors(self.path), self.path.open("rb") as file:
            magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise DestinationError(f"{self.path} exists and is not a GGUF file; give another destination")

    def _open(self) -> int:
        if self.partial.exists() and not self.partial.is_file():
            raise DestinationError(f"{self.partial} is in the way and is not a file; move it")
        return os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def _commit(self) -> None:
        self.partial.replace(self.path)
        self._committed = True
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)
