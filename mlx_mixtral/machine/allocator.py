"""What the process has freed, and its allocators keep for later."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import mlx.core as mx

__all__ = ["give_back_freed"]


def give_back_freed() -> None:
    """Give freed memory back to the system.

    MLX keeps the buffers that it frees. So does glibc: once a block has been freed, blocks up to its size (at most 32 MB) come
    from a heap, whose free parts stay with the process until they are at its end (mallopt(3), ``M_MMAP_THRESHOLD``).
    """
    mx.clear_cache()
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's ``malloc_trim``; None on other systems."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
