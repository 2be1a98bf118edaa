"""Freed memory goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Blocks of 8 MB from a heap, after one of 24 MB was freed; the last one stays, so that no free part is at the heap's end.
SCRIPT = """
import ctypes, json
from pathlib import Path
from mlx_mixtral.machine.allocator import give_back_freed

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 8 * 2**20
c.free(c.malloc(3 * size))
before = resident()
blocks = [c.malloc(size) for _ in range(20)]
for block in blocks:
    ctypes.memset(block, 1, size)
full = resident() - before
for block in blocks[:-1]:
    c.free(block)
kept = resident() - before
give_back_freed()
print(json.dumps([full, kept, resident() - before, size]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of a process")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    full, kept, left, size = json.loads(done.stdout)
    assert full >= 19 * size
    if kept < 10 * size:
        pytest.skip("this C library gives memory back by itself")
    assert left <= 2 * size
