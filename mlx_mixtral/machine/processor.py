"""The processor's threads, and numpy's BLAS, which has threads of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

__all__ = ["blas_name", "one_blas_thread", "shares_blas", "thread_count"]

_lock = threading.Lock()
_inside = 0
_before = 1


@cache
def thread_count() -> int:
    """Threads to compute with: those this process may run at once, and no more than numpy's BLAS was given.

    OpenBLAS takes that from ``OPENBLAS_NUM_THREADS`` or ``OMP_NUM_THREADS``.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    openblas = _openblas()
    return max(1, own if openblas is None else min(own, openblas[0]()))


def blas_name() -> str:
    """What numpy was built with, such as ``scipy-openblas``."""
    built = np.show_config(mode="dicts")
    return str(built["Build Dependencies"]["blas"]["name"])


def shares_blas() -> bool:
    """Whether several threads can each have products of their own: OpenBLAS can be told to, Accelerate does it."""
    return _openblas() is not None or "accelerate" in blas_name().lower()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have numpy's BLAS compute a product on the thread that asks for it, if it can be told to.

    OpenBLAS lets one product at a time use all its threads, which wait for each other at every step.
    """
    global _inside, _before
    openblas = _openblas()
    if openblas is None:
        yield
        return
    get, put = openblas
    with _lock:
        if not _inside:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                put(_before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions of numpy's own OpenBLAS that get and set its number of threads; None where it comes with another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            library = ctypes.CDLL(str(path))
            for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
                names = (f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set"))
                get, put = (getattr(library, name, None) for name in names)
                if get is not None and put is not None:
                    return get, put
    return None
