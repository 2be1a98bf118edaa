"""What the process has freed, and its allocators keep for later."""

from __future__ import annotations

import ctypes
from functools import cache

import mlx.core as mx

__all__ = ["give_back_freed"]

# Of mallopt(3): the option, and bytes.
_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**23
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 2**26


def give_back_freed() -> None:
    """Give freed memory back to the system, and from now on large blocks as soon as they are freed.

    MLX keeps the buffers that it frees. So does glibc: once a block has been freed, blocks up to its size (at most 32 MB) come
    from heaps, whose free parts stay with the process. What is alive in between decides how much that is: with blocks of 17 MB
    it was up to half a gigabyte.
    """
    mx.clear_cache()
    if (c := _glibc()) is not None:
        c.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, told to take large blocks from the system one by one."""
    try:
        c = ctypes.CDLL(None)
        mallopt, _ = c.mallopt, c.malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    return c
