"""Ends a process that waits for a machine which does not answer: MLX itself would wait for ever."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

__all__ = ["Deadline", "end_process", "start_deadline"]

TICK_S = 0.25
LOST_S = 1.0
"""How long MLX may take to notice that a connection has ended."""
# Reads the line on its stdin that calls it off; else says why and ends its parent.
_GUARD = """
import os, select, sys
seconds, parent, said = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([sys.stdin], [], [], seconds)[0] and os.getppid() == parent:
    sys.stderr.write(said + "\\n")
    sys.stderr.flush()
    os.kill(parent, 9)
"""


@contextlib.contextmanager
def start_deadline(seconds: float, said: str) -> Iterator[None]:
    """Say ``said`` on stderr and kill this process unless the block ends in time.

    A process of its own watches: while MLX connects, no thread of this interpreter runs.
    """
    command = [sys.executable, "-c", _GUARD, str(seconds), str(os.getpid()), f"mlx-mixtral: {said}"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def end_process(said: str, status: int = 1) -> NoReturn:
    """Say why, and end at once: threads that wait inside MLX cannot be ended in another way."""
    sys.stdout.flush()
    if said:
        sys.stderr.write(f"mlx-mixtral: {said}\n")
    sys.stderr.flush()
    os._exit(status)


class Deadline:
    """Ends the process when the group makes no progress for ``timeout_s`` while something is waited for.

    A thread watches; MLX gives the interpreter's lock back while it waits. It ends the process also when a connection has
    ended and MLX does not notice.

    Args:
        lost: tells which machine's connection has ended.
    """

    def __init__(self, timeout_s: float, rank: int, size: int, lost: Callable[[], int | None] = lambda: None) -> None:
        self.timeout_s, self._rank, self._size, self._lost = timeout_s, rank, size, lost
        self.on_end: Callable[[str], None] = end_process
        """What ends the process, told why; called on the watching thread."""
        self._lock = threading.Lock()
        self._since: float | None = None
        self._depth = 0
        self._for = ""
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def armed(self, whom: str) -> Iterator[None]:
        """Within the block ``progress`` must be called every ``timeout_s``; ``whom`` is waited for."""
        with self._lock:
            self._depth += 1
            self._since, self._for = time.monotonic(), whom
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="mlx-mixtral-group", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                self._since = time.monotonic() if self._depth else None

    def stop(self) -> None:
        """Watch no more, until it is armed again."""
        with self._lock:
            self._thread = None

    def progress(self) -> None:
        """Something came to its end."""
        if self._since is not None:
            self._since = time.monotonic()

    def _watch(self) -> None:
        lost_at: float | None = None
        own = f"rank {self._rank} of {self._size}"
        while self._thread is threading.current_thread():
            time.sleep(min(TICK_S, self.timeout_s / 4))
            since, now = self._since, time.monotonic()
            if since is None:
                lost_at = None
                continue
            if (rank := self._lost()) is None:
                lost_at = None
            elif lost_at is None:
                lost_at = now
            elif now - lost_at > LOST_S:
                self.on_end(
                    f"{own}: the connection to rank {rank} was lost; see what it said last, and start all again"
                )
                return
            if now - since > self.timeout_s:
                self.on_end(
                    f"{own}: nothing came from {self._for} for {self.timeout_s:g} s; see whether each of them still runs, or "
                    "give --peer-timeout more"
                )
                return
