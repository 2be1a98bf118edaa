"""Freed memory goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Blocks of 8 MB, after one of 24 MB was freed; the last one stays, so that no free part is at a heap's end. How much more is
# held with all of them, with the last, and after memory was given back.
SCRIPT = """
import ctypes, json, sys
from pathlib import Path
from mlx_mixtral.machine.allocator import give_back_freed

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 8 * 2**20
if sys.argv[1:]:
    give_back_freed()
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
print(json.dumps([found / size for found in (full, kept, resident() - before)]))
"""


def held(*arguments: str) -> tuple[float, float, float]:
    """In blocks."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    full, kept, left = json.loads(done.stdout)
    return full, kept, left


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of a process")
def test_freed_memory_goes_back() -> None:
    full, kept, left = held()
    if kept < 10:
        pytest.skip("this C library gives memory back by itself")
    assert full > 19
    assert left < 2
    full, kept, left = held("asked before")
    assert full > 19
    assert kept < 2
    assert left < 2
