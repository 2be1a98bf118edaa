"""Measured tasks in processes of their own, so that time and peak memory are their own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def resident(key: str) -> int:
    """A line of this process's memory, ``VmRSS`` or its peak ``VmHWM``, in bytes; Linux only."""
    return 1024 * int(STATUS.read_text().partition(f"{key}:")[2].split()[0])


def peak_bytes() -> int:
    """Peak resident memory of this process. Linux's ``ru_maxrss`` begins with the parent's, so it is not asked."""
    return resident("VmHWM") if STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_json(script: str, *arguments: object, prefix: list[str] | None = None) -> Any:
    """What ``script`` prints on its last line, as JSON.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    command = [*(prefix or []), sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise RuntimeError(f"ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:] or f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
