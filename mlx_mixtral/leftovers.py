"""What killed processes left: partial files and scratch folders, removed by the next run that makes the same.

Their names hold the number of the process that made them, and it keeps them locked: both have to say that it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["lock", "remove_leftovers", "scratch_folder"]


def lock(descriptor: int) -> bool:
    """Whether a lock was got; file systems without locks give none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path, start: str, end: str) -> None:
    """Remove files and folders ``{start}PID{end}…`` whose process is gone; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            name = entry.name
            pid = name[len(start) :].removesuffix(end).partition("-")[0]
            if name.startswith(start) and name.endswith(end) and re.fullmatch(r"[0-9]{1,9}", pid):
                with contextlib.suppress(OSError):
                    if not _is_running(int(pid)) and entry.lstat().st_uid == os.getuid():
                        _remove_unlocked(entry)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_unlocked(entry: Path) -> None:
    """Remove what no other process has locked: one in another container has a number of its own, which means nothing here."""
    descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder for a run of ``purpose``; those of earlier runs that were killed are removed."""
    start = f"mlx-mixtral-{purpose}-"
    remove_leftovers(Path(tempfile.gettempdir()), start, "")
    with tempfile.TemporaryDirectory(prefix=f"{start}{os.getpid()}-") as name:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            lock(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)
