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

__all__ = ["Rank", "ended", "free_ports", "ranks"]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


@dataclass
class Rank:
    """One process, and the lines it has said."""

    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def read(self) -> list[threading.Thread]:
        def characters() -> None:
            assert self.process.stdout is not None
            while piece := self.process.stdout.read(1):
                self.out.append(piece)

        def lines() -> None:
            self.err.extend(self.process.stderr or ())

        threads = [threading.Thread(target=work, daemon=True) for work in (characters, lines)]
        for thread in threads:
            thread.start()
        return threads

    @property
    def said(self) -> str:
        """Its stderr without what MLX's ring says of broken sockets."""
        return "".join(line for line in self.err if not line.startswith("[ring]"))

    def wait_for_text(self) -> None:
        """Until it has printed something, a character even."""
        end = time.monotonic() + PATIENCE_S
        while not self.out:
            assert self.process.poll() is None, (self.process.returncode, "".join(self.err))
            assert time.monotonic() < end, "nothing was printed"
            time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _mind_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def ranks(
    count: int, *arguments: str | Path, each: Sequence[Sequence[str]] = (), started: int | None = None
) -> Iterator[list[Rank]]:
    """``python ARGUMENTS`` as ``count`` machines; whatever still runs afterwards is killed.

    Args:
        each: further arguments of each.
        started: how many of them are started at all.
    """
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(count)]
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
                    # Whoever starts the tests in the background has Ctrl-C ignored, and so would these.
                    preexec_fn=_mind_interrupts,
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
