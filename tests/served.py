"""``mlx-mixtral serve`` in a process of its own, and what it takes of the machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

__all__ = ["ServedProcess", "served"]

START_S = 120.0


class ServedProcess:
    """A server on a free port of 127.0.0.1, which listens once this is made.

    Args:
        options: of ``mlx-mixtral serve``.

    Raises:
        RuntimeError: it ended before it listened; with its last lines.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "mlx_mixtral",
            "serve",
            str(folder),
            "--port",
            "0",
            "--device",
            "cpu",
            *options,
        ]
        self._lines: list[str] = []
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._listens = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listens.wait(START_S) or not self.url:
            self._process.kill()
            raise RuntimeError(f"the server does not listen: {' '.join(self._lines[-5:])}")
        host, _, port = self.url.rpartition("/")[2].rpartition(":")
        self.address = (host, int(port))

    @property
    def url(self) -> str:
        found = re.search(r"listening at (\S+)/v1 ", "".join(self._lines))
        return "" if found is None else found[1]

    @property
    def log(self) -> str:
        """What it said so far."""
        return "".join(self._lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> Any:
        return httpx.get(f"{self.url}/v1/status", timeout=60).json()

    def is_idle(self) -> bool:
        status = self.status()
        return not status["requests_open"] and not status["rows"]["running"]

    @property
    def resident_bytes(self) -> int:
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return 1024 * int(said.stdout)

    @property
    def open_files(self) -> int | None:
        """None where the system does not say."""
        folder = Path(f"/proc/{self.pid}/fd")
        return len(os.listdir(folder)) if folder.is_dir() else None  # noqa: PTH208

    @property
    def threads(self) -> int | None:
        """None where the system does not say."""
        folder = Path(f"/proc/{self.pid}/task")
        return len(os.listdir(folder)) if folder.is_dir() else None  # noqa: PTH208

    def terminate(self) -> float:
        """End it by SIGTERM; how many seconds that takes."""
        started = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        return time.perf_counter() - started

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if "listening at" in line:
                self._listens.set()
        self._listens.set()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[ServedProcess]:
    """A ``ServedProcess``, which is gone afterwards."""
    process = ServedProcess(folder, *options)
    try:
        yield process
    finally:
        process.close()
