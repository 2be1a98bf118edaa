"""How many bytes a model may take on this machine when the user names no budget.

Memory pressure on macOS. Unified memory serves programs and GPU alike. When it runs short, macOS drops cached files, then
compresses pages of idle programs, then swaps them; at the end it asks the user to close programs, and kills some. What a
process wires is out of its reach: wired weights stay fast, and everything else pays. How much a GPU may wire is limited, by
default to 2/3 or 3/4 of the memory (``recommendedMaxWorkingSetSize``); beyond it Metal pages weights in and out for every
token. So: stay within that limit and within what is free or quickly freed, and keep files cached, for streamed experts come
through there. What the user can do, best first: close programs, choose fewer bits, pass a smaller ``memory``. Raising the
limit (``sysctl iogpu.wired_limit_mb``) takes memory the system needs itself and has ended in kernel panics; we never do it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_mixtral.machine.device import Device  # imports MLX, which this module is to be quick without

__all__ = ["SystemMemory", "read_system_memory", "usable_bytes"]

# Idle programs take about a tenth of a Mac's memory that macOS compresses or swaps under mild pressure, without harm.
COMPRESSIBLE_TENTHS = 1
SPARE_TENTHS = 1
# cgroup v1 says "no limit" with the largest multiple of a page below 2^63.
UNLIMITED_BYTES = 2**60


@dataclass(frozen=True)
class SystemMemory:
    """The machine's memory, what programs can still get of it, and what a container's limit leaves (None: no limit)."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None


def usable_bytes(device: Device, system: SystemMemory | None) -> int | None:
    """Bytes a model may take on ``device`` now; None where nothing is known.

    Metal: the recommended working set, within what is free or reclaimable plus a tenth of all memory. CUDA: the device's
    memory less a tenth. CPU: what is available, within the container's limit, less a tenth.
    """
    if device.kind == "cuda":
        return None if device.memory_bytes is None else device.memory_bytes * (10 - SPARE_TENTHS) // 10
    if device.kind == "metal":
        limits = [device.recommended_bytes]
        if system is not None:
            limits.append(system.available_bytes + system.total_bytes * COMPRESSIBLE_TENTHS // 10)
        return min((limit for limit in limits if limit is not None), default=None)
    if system is None:
        return None
    within = system.available_bytes if system.limit_bytes is None else min(system.available_bytes, system.limit_bytes)
    return within * (10 - SPARE_TENTHS) // 10


def read_system_memory() -> SystemMemory | None:
    """Ask the operating system; None where it does not answer as expected."""
    try:
        if sys.platform == "darwin":
            total = int(_output("/usr/sbin/sysctl", "-n", "hw.memsize"))
            return SystemMemory(total, _parse_vm_stat(_output("/usr/bin/vm_stat")))
        total, available = _parse_meminfo(Path("/proc/meminfo").read_text())
        return SystemMemory(total, available, _cgroup_room(Path("/")))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout


def _parse_meminfo(text: str) -> tuple[int, int]:
    """Total and available bytes of Linux's ``/proc/meminfo``."""
    kib = {name: int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if not {"MemTotal", "MemAvailable"} <= kib.keys():
        raise ValueError("/proc/meminfo lacks MemTotal or MemAvailable")
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024


def _parse_vm_stat(text: str) -> int:
    """Bytes that are free, cached files or purgeable: what Activity Monitor does not count as used."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = dict(re.findall(r'^"?([^":]+)"?:\s+(\d+)\.?$', text, re.MULTILINE))
    names = ("Pages free", "File-backed pages", "Pages purgeable")
    if size is None or not set(names) <= pages.keys():
        raise ValueError("vm_stat prints something else")
    return int(size[1]) * sum(int(pages[name]) for name in names)


def _parse_cgroup(limit: str, usage: str, stat: str) -> int | None:
    """What a control group leaves: limit less usage, inactive cached files not counted as used; None without a limit."""
    if limit.strip() == "max" or int(limit) >= UNLIMITED_BYTES:
        return None
    cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
    return max(int(limit) - int(usage) + (int(cached[1]) if cached else 0), 0)


def _cgroup_room(root: Path) -> int | None:
    """The least that any control group around this process leaves, version 2 or 1; None without limits.

    Paths in ``/proc/self/cgroup`` may be as the host sees them: what is not there is looked for further up.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    rooms = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            try:
                texts = [(mount / group / name).read_text() for name in (*names, "memory.stat")]
                rooms.append(_parse_cgroup(*texts))
            except (OSError, ValueError):
                continue  # the root group has no limit files
    return min((room for room in rooms if room is not None), default=None)
