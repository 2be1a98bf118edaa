"""Two rates that bound generation: copying in memory, reading from disk."""

from __future__ import annotations

import fcntl
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

__all__ = ["disk_bandwidth", "memory_bandwidth"]

_F_NOCACHE = 48  # macOS fcntl.h; Python does not name it on other systems
READ_BYTES = 4 * 2**20


def memory_bandwidth(nbytes: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes read and written a second by the device copying an array; the median of ``repeats``."""
    array = mx.zeros(nbytes // 4, mx.float32)
    mx.eval(array)
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(array + 1.0)
        rates.append(2 * nbytes / (time.perf_counter() - started))
    return statistics.median(rates)


def disk_bandwidth(nbytes: int = 256 * 2**20, threads: int = 8) -> float:
    """Bytes a second of parallel reads past the page cache, from a file written to the temporary folder for this."""
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
