"""Several processes on this machine as the machines of a group, over MLX's ring."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Rank", "ended", "ranks"]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


@dataclass
class Rank:
    """One process, and the lines it has said."""

    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def read(self) -> list[threading.Thread]:
        pairs = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        threads = [threading.Thread(target=lines.extend, args=(stream,), daemon=True) for stream, lines in pairs]
        for thread in threads:
            thread.start()
        return threads

    @property
    def said(self) -> str:
        """Its stderr without what MLX's ring says of broken sockets."""
        return "".join(line for line in self.err if not line.startswith("[ring]"))

    def wait_for(self, text: str) -> None:
        """Until it has printed ``text``."""
        end = time.monotonic() + PATIENCE_S
        while not any(text in line for line in self.out):
            assert self.process.poll() is None, (self.process.returncode, "".join(self.err))
            assert time.monotonic() < end, f"{text!r} never came"
            time.sleep(0.02)


@contextlib.contextmanager
def ranks(
    count: int, *arguments: str | Path, each: Sequence[Sequence[str]] = (), started: int | None = None
) -> Iterator[list[Rank]]:
    """``python ARGUMENTS`` as ``count`` machines; whatever still runs afterwards is killed.

    Args:
        each: further arguments of each.
        started: how many of them are started at all.
    """
    sockets = [socket.socket() for _ in range(count)]
    for each_socket in sockets:
        each_socket.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{each_socket.getsockname()[1]}"] for each_socket in sockets]
    for each_socket in sockets:
        each_socket.close()
    found: list[Rank] = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(hosts, file)
        file.flush()
        try:
            for rank in range(count if started is None else started):
                own = [str(part) for part in (*arguments, *(each[rank] if each else ()))]
                paths = os.pathsep.join([str(ROOT), str(ROOT / "convert"), os.environ.get("PYTHONPATH", "")])
                environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name, "PYTHONPATH": paths}
                process = subprocess.Popen(
                    [sys.executable, *own],
                    env=environment,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                found.append(Rank(process))
                found[-1].read()
            yield found
        finally:
            for each_rank in found:
                if each_rank.process.poll() is None:
                    each_rank.process.send_signal(signal.SIGCONT)
                    each_rank.process.kill()
                each_rank.process.wait()
                for stream in (each_rank.process.stdout, each_rank.process.stderr):
                    if stream is not None:
                        stream.close()


def ended(found: Sequence[Rank], seconds: float = PATIENCE_S) -> list[int]:
    """Exit statuses, once all have ended of themselves."""
    end = time.monotonic() + seconds
    for each in found:
        try:
            each.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a rank still runs after {seconds:g} s; it said {each.out} {each.err}") from None
    time.sleep(0.05)  # the threads that read
    return [each.process.returncode for each in found]
