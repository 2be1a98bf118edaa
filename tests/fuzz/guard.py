"""What a conversion must not do, seen by the interpreter itself: run something, reach the network, leave its folders.

The hook hears of every such act (https://docs.python.org/3/library/audit_events.html), whichever library does it, and cannot
be removed again: it belongs into a process of its own.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Canary", "limit_memory"]

_ACTS = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "code.__new__", "ctypes.dlopen", "ctypes.dlsym", "socket.connect", "socket.getaddrinfo",
    "socket.bind", "webbrowser.open", "marshal.loads", "os.putenv", "os.kill",
}  # fmt: skip
# Event -> how many of its first arguments are paths it changes.
_CHANGES = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2, "os.setxattr": 1,
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SYSTEM = ("/etc/", "/dev/", "/proc/")


class Canary:
    """Records what happens while ``watching``: ``seen`` is empty after a conversion that behaved.

    Writing is allowed below ``root/out`` only; of ``root`` just ``source`` and ``out`` may be read.
    """

    def __init__(self, root: Path) -> None:
        self.seen: list[str] = []
        self._root, self._out, self._source = (f"{path}{os.sep}" for path in (root, root / "out", root / "source"))
        self._armed = False
        sys.addaudithook(self._hear)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.seen = []
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            self._opened(*args)
        elif event in _ACTS:
            self.seen.append(f"{event} {args!r:.200}")
        elif event in ("exec", "compile"):
            # Modules imported late are run too, from files.
            name = getattr(args[0], "co_filename", "") if event == "exec" else args[1]
            if isinstance(name, str) and name.startswith("<") and not name.startswith("<frozen"):
                self.seen.append(f"{event} of {name}")
        elif event in _CHANGES:
            for path in args[: _CHANGES[event]]:
                # Names relative to an open folder are those of a tree being removed, which was heard of as a whole.
                if Path(os.fsdecode(path)).is_absolute() and not self._below_out(path):
                    self.seen.append(f"{event} {path}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        full = os.path.normpath(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100
        writes = bool(flags & _WRITES) if isinstance(flags, int) else any(letter in str(mode) for letter in "wax+")
        if writes and not self._below_out(full):
            self.seen.append(f"open for writing {full}")
        elif full.startswith(self._root):
            if not f"{full}{os.sep}".startswith((self._out, self._source)):
                self.seen.append(f"open outside the source {full}")
        elif full.startswith(_SYSTEM):
            self.seen.append(f"open of the system's {full}")

    def _below_out(self, path: Any) -> bool:
        return f"{os.path.normpath(os.fsdecode(path))}{os.sep}".startswith(self._out)


def limit_memory(more_bytes: int) -> None:
    """Let the address space grow by ``more_bytes`` from what it is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
