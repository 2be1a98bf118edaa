"""The destination appears complete or not at all: a sibling folder is filled, then renamed.

parent/.NAME.partial   being written; after an interruption it stays as long as it has a journal to go on from
parent/NAME            the result; one rename, so nobody ever sees a part of it
parent/.NAME.old       what --overwrite replaces, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from mlx_mixtral.arguments import as_path
from mlx_mixtral.config.mixtral import read_json
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError, MixtralError
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral.weights.manifest import MANIFEST
from mlx_mixtral_convert.output.journal import JOURNAL
from mlx_mixtral_convert.output.write import sync_folder

__all__ = ["MANIFEST", "Destination", "check_names"]

_IGNORED = (".DS_Store",)


def check_names(source: str | Path, dest: str | Path) -> None:
    """Raise InvalidRequestError for what is no path, and for an empty name, which would be the current folder."""
    for name, what in ((source, "source"), (dest, "destination")):
        if name == "":
            raise InvalidRequestError(f"the {what} is an empty name; write . for the current folder")
        as_path("source" if what == "source" else "dest", name)


class Destination:
    """Where a conversion goes. As a context manager it makes ``partial``, and removes it unless ``commit`` was called
    or a journal lies in it.

    Args:
        path: the folder to make; missing parents are made, and removed again on failure.
        source: the folder converted from, which must not be touched.
        overwrite: whether a finished conversion at ``path`` may be replaced.

    Raises:
        DestinationError: ``path`` is inside the source, holds something that is not ours, is a finished conversion or a mount
            point, cannot be written, or another conversion is writing it.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool = False) -> None:
        self.path = path.expanduser().resolve()
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._overwrite = overwrite
        self._old = self.path.with_name(f".{self.path.name}.old")
        self._made: list[Path] = []
        self._lock = -1
        self._committed = False
        self._disk = _existing(self.path)
        self._check(source.resolve(), overwrite)

    def free_bytes(self) -> int:
        """Room on the disk the destination will be on."""
        return shutil.disk_usage(self._disk).free

    def check_space(self, needed_bytes: int) -> None:
        """Raise DiskSpaceError unless ``needed_bytes`` are free."""
        free = self.free_bytes()
        if free < needed_bytes:
            raise DiskSpaceError(
                f"the conversion needs {format_bytes(needed_bytes)} and {self._disk} has {format_bytes(free)} "
                "free; free some room, choose another destination or fewer bits"
            )

    def __enter__(self) -> Path:
        try:
            self._make_parents()
            self._recover()
            with contextlib.suppress(FileExistsError):
                self.partial.mkdir()
            self._take_lock()
        except OSError as error:
            self._remove()
            raise self._unwritable(error) from error
        except BaseException:
            self._remove()
            raise
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def commit(self) -> None:
        """Make ``partial`` the destination. What was there goes only after the new folder is in place."""
        try:
            sync_folder(self.partial)
            replaces = self.path.is_dir() and any(self.path.iterdir())
            if replaces:
                self.path.rename(self._old)
            try:
                self.partial.rename(self.path)
            except BaseException:
                if replaces:
                    self._old.rename(self.path)
                raise
            self._committed = True
            # Only now: a run killed between these two lines has lost nothing.
            (self.path / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.path.parent)
            if replaces:
                shutil.rmtree(self._old, ignore_errors=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _check(self, source: Path, overwrite: bool) -> None:
        if self.path == source:
            raise DestinationError(f"{self.path} is the source itself; give another destination")
        if source in self.path.parents:
            raise DestinationError(f"{self.path} lies inside the source {source}; give a destination outside it")
        if self.path in source.parents:
            raise DestinationError(f"{self.path} contains the source {source}; give another destination")
        parent = _existing(self.path.parent)
        if not parent.is_dir():
            raise DestinationError(f"{self.path} cannot be made: {parent} is a file, not a folder")
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise DestinationError(f"{self.path} exists and is a file; give a folder")
        if os.path.ismount(self.path):
            raise DestinationError(
                f"{self.path} is where a disk is mounted, which a folder cannot be renamed to; give a folder in it, such "
                f"as {self.path / 'model'}"
            )
        try:
            present = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _IGNORED)
            if MANIFEST in present and JOURNAL in present:
                (self.path / JOURNAL).unlink()
                present.remove(JOURNAL)
        except OSError as error:
            raise self._unwritable(error) from error
        if not present:
            return
        if MANIFEST not in present:
            raise DestinationError(
                f"{self.path} exists and was not made by a conversion (it holds {present[0]}); give another destination"
            )
        if not overwrite:
            raise DestinationError(f"{self.path} is a finished conversion already; replace it with --overwrite")
        if strangers := sorted(set(present) - self._listed()):
            raise DestinationError(
                f"{self.path} holds {strangers[0]}, which the conversion there did not write; move it before --overwrite"
            )

    def _listed(self) -> set[str]:
        """Files a finished conversion says it wrote."""
        try:
            files = read_json(self.path / MANIFEST).get("files")
        except MixtralError:
            files = None
        return {MANIFEST, *files} if isinstance(files, dict) else set()

    def _make_parents(self) -> None:
        missing = [parent for parent in self.path.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def _recover(self) -> None:
        """A run killed between the two renames of an overwrite left the old folder aside."""
        if self._old.is_dir():
            if self.path.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.path)
                if not self._overwrite:
                    raise DestinationError(
                        f"{self.path} was left aside by an interrupted run and is back; replace it with --overwrite"
                    )

    def _take_lock(self) -> None:
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise DestinationError(f"another conversion is writing {self.path}; wait for it or stop it") from None

    def _remove(self) -> None:
        """Undo what was made; only a locked partial folder is ours to remove."""
        if self._lock >= 0:
            if not self._committed and not (self.partial / JOURNAL).exists():
                shutil.rmtree(self.partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        if not self._committed:
            for parent in reversed(self._made):
                with contextlib.suppress(OSError):
                    parent.rmdir()
            self._made.clear()

    def _unwritable(self, error: OSError) -> DestinationError:
        return DestinationError(f"{self.path} cannot be written: {error.strerror or error}; give another destination")


def _existing(path: Path) -> Path:
    """The nearest ancestor that exists, ``path`` included."""
    return next((p for p in (path, *path.parents) if os.path.lexists(p)), Path(path.anchor))
