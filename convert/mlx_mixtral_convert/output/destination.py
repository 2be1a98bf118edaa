"""The destination appears complete or not at all: a hidden sibling is filled, then renamed.

parent/.NAME.partial   being written; after an interruption a folder stays as long as it has a journal to go on from
parent/NAME            the result; one rename, so nobody ever sees a part of it
parent/.NAME.old       what --overwrite replaces, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError, MixtralError
from mlx_mixtral.files import disk_errors, swap_folder, sync_folder
from mlx_mixtral.reading import read_json
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral.weights.manifest import MANIFEST
from mlx_mixtral_convert.output.journal import JOURNAL

__all__ = ["MANIFEST", "SPARE_BYTES", "Destination", "FolderDestination", "as_destination"]

# conversion.json, the file system's own blocks.
SPARE_BYTES = 2**20
_IGNORED = (".DS_Store",)


def as_destination(dest: str | Path) -> Path:
    """The path of a destination. Raises InvalidRequestError for an empty name, which would be the current folder."""
    if isinstance(dest, str) and not dest:
        raise InvalidRequestError("the destination has an empty name; write . for the current folder")
    return as_path("dest", dest)


class Destination(ABC):
    """Where a conversion or an export goes. As a context manager it makes and locks ``partial``, and removes it unless
    ``commit`` was called.

    Args:
        path: the folder or file to make; missing parents are made, and removed again on failure.
        source: the folder or file that is read, which must not be touched.
        overwrite: whether what an earlier run made at ``path`` may be replaced.

    Raises:
        DestinationError: ``path`` is the source or inside it, holds something that is not ours, cannot be written, or another
            run is writing it.
    """

    job: ClassVar[str]
    """What is being done, in messages."""
    smaller: ClassVar[str]
    """What makes the result smaller, likewise."""

    def __init__(self, path: Path, source: Path, *, overwrite: bool = False) -> None:
        # Unlike Path.resolve this takes a loop of links.
        self.path = Path(os.path.realpath(path.expanduser()))
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._lock = -1
        self._committed = False
        # The nearest that exists.
        self._disk = next((p for p in (self.path, *self.path.parents) if os.path.lexists(p)), Path(self.path.anchor))
        source = Path(os.path.realpath(source))
        if self.path == source:
            raise DestinationError(f"{self.path} is the source itself; give another destination")
        if source in self.path.parents:
            raise DestinationError(f"{self.path} lies inside the source {source}; give a destination outside it")
        self._check(source)

    def check_space(self, needed_bytes: int) -> None:
        """Raise DiskSpaceError unless ``needed_bytes`` are free."""
        free = self.free_bytes()
        if free < needed_bytes:
            raise DiskSpaceError(
                f"the {self.job} needs {format_bytes(needed_bytes)} and {self._disk} has {format_bytes(free)} free; "
                f"free some space, choose another destination or {self.smaller}"
            )

    def free_bytes(self) -> int:
        """Room on the disk the destination will be on."""
        return shutil.disk_usage(self._disk).free

    def __enter__(self) -> Path:
        try:
            with disk_errors(self.path):
                for parent in reversed([parent for parent in self.path.parents if not parent.exists()]):
                    parent.mkdir()
                    self._made.append(parent)
                self._lock = self._open()
                self._take_lock()
        except BaseException:
            self._remove()
            raise
        return self.partial

    def __exit__(self, *error: object) -> None:
        self._remove()

    def commit(self) -> None:
        """Make ``partial`` the destination. What was there goes only after the new one is in place."""
        with disk_errors(self.path):
            self._commit()

    @abstractmethod
    def _check(self, source: Path) -> None:
        """Raise DestinationError for a path that cannot be used, whatever the source."""

    @abstractmethod
    def _open(self) -> int:
        """Make ``partial``; its descriptor."""

    @abstractmethod
    def _commit(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None:
        """Remove ``partial``, unless there is something in it to go on from."""

    def _check_parent(self) -> None:
        parent = self._disk if self._disk != self.path else self.path.parent
        if not parent.is_dir():
            raise DestinationError(f"{self.path} cannot be made: {parent} is a file, not a folder")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise DestinationError(f"another {self.job} is writing {self.path}; wait for it or stop it") from None

    def _remove(self) -> None:
        """Undo what was made; only what we locked is ours to remove."""
        if self._lock >= 0:
            if not self._committed:
                self._discard()
            os.close(self._lock)
            self._lock = -1
        if not self._committed:
            for parent in reversed(self._made):
                with contextlib.suppress(OSError):
                    parent.rmdir()
            self._made.clear()


class FolderDestination(Destination):
    """A folder. ``partial`` stays after a failure when a journal lies in it; a mount point cannot be replaced."""

    job, smaller = "conversion", "fewer bits"

    def _check(self, source: Path) -> None:
        if self.path in source.parents:
            raise DestinationError(f"{self.path} contains the source {source}; give another destination")
        self._check_parent()
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise DestinationError(f"{self.path} exists and is a file; give a folder")
        if os.path.ismount(self.path):
            raise DestinationError(
                f"{self.path} is a mount point, which cannot be replaced; give a folder in it, such "
                f"as {self.path / 'model'}"
            )
        with disk_errors(self.path):
            present = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _IGNORED)
            if MANIFEST in present and JOURNAL in present:
                (self.path / JOURNAL).unlink()
                present.remove(JOURNAL)
        if not present:
            return
        if MANIFEST not in present:
            raise DestinationError(
                f"{self.path} exists and was not made by a conversion (it holds {present[0]}); give another destination"
            )
        if not self._overwrite:
            raise DestinationError(f"{self.path} is already a finished conversion; replace it with --overwrite")
        if strangers := sorted(set(present) - self._listed()):
            raise DestinationError(
                f"{self.path} holds {strangers[0]}, which that conversion did not write; move it before using --overwrite"
            )

    def _listed(self) -> set[str]:
        """Files a finished conversion says it wrote."""
        try:
            files = read_json(self.path / MANIFEST).get("files")
        except MixtralError:
            files = None
        return {MANIFEST, *files} if isinstance(files, dict) else set()

    @property
    def _old(self) -> Path:
        return self.path.with_name(f".{self.path.name}.old")

    def _open(self) -> int:
        self._recover()
        with contextlib.suppress(FileExistsError):
            self.partial.mkdir()
        return os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def _recover(self) -> None:
        """A run killed between the two renames of an overwrite left the old folder aside."""
        if self._old.is_dir():
            if self.path.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.path)
                if not self._overwrite:
                    raise DestinationError(
                        f"{self.path} was moved aside by an interrupted run and has been restored; replace it with --overwrite"
                    )

    def _commit(self) -> None:
        sync_folder(self.partial)
        swap_folder(self.partial, self.path, self._old)
        self._committed = True
        # Only now: a run killed between these two lines has lost nothing.
        (self.path / JOURNAL).unlink(missing_ok=True)
        sync_folder(self.path.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _discard(self) -> None:
        if not (self.partial / JOURNAL).exists():
            shutil.rmtree(self.partial, ignore_errors=True)
