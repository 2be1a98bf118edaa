"""Two rates that bound generation: copying in memory, reading from disk."""

from __future__ import annotations

import fcntl
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

__all__ = ["copy_rates", "disk_bandwidth", "memory_bandwidth"]

_F_NOCACHE = 48  # macOS fcntl.h; Python does not name it on other systems
READ_BYTES = 4 * 2**20
COPY_BYTES = 256 * 2**20


def memory_bandwidth(nbytes: int = COPY_BYTES, repeats: int = 5) -> float:
    """Bytes read and written a second by the device copying an array; the median of ``repeats``."""
    return statistics.median(copy_rates(nbytes, repeats))


def copy_rates(nbytes: int = COPY_BYTES, repeats: int = 5) -> list[float]:
    """The same, each time it was measured.

    On the CPU by one thread, into memory that was written before: MLX itself asks the system for fresh pages each time, and
    would measure that.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        return [_rate(lambda: np.copyto(target, source), nbytes) for _ in range(repeats)]
    array = mx.zeros(nbytes // 4, mx.float32)
    mx.eval(array)
    return [_rate(lambda: mx.eval(array + 1.0), nbytes) for _ in range(repeats)]


def _rate(copy: Callable[[], object], nbytes: int) -> float:
    started = time.perf_counter()
    copy()
    return 2 * nbytes / (time.perf_counter() - started)


def disk_bandwidth(nbytes: int = 256 * 2**20, threads: int = 8) -> float:
    """Bytes per second of parallel reads past the page cache, from a file written to the temporary folder for this."""
    block = np.random.default_rng(0).bytes(READ_BYTES)
    with tempfile.TemporaryFile() as file:
        descriptor = file.fileno()
        for _ in range(nbytes // READ_BYTES):
            file.write(block)
        file.flush()
        os.fsync(descriptor)
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, _F_NOCACHE, 1)
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            read = sum(
                pool.map(lambda at: len(os.pread(descriptor, READ_BYTES, at)), range(0, nbytes, READ_BYTES)),
            )
        return read / (time.perf_counter() - started)
