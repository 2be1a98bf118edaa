"""Compiled functions that leave nothing behind in the threads that called them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import mlx.core as mx

__all__ = ["Compiled"]

P = ParamSpec("P")
R = TypeVar("R")


class Compiled(threading.local, Generic[P, R]):
    """``mx.compile`` of a function, once for each thread that calls it.

    MLX keeps what it compiled for the thread that called, Python objects in it, and drops it when the operating system ends
    the thread: later than Python's ``join`` returns. A program that leaves just then is aborted ("terminate called without an
    active exception", MLX 0.32; ml-explore/mlx pull request 4373 has it that threads must clean up themselves). An object of
    the thread's own goes while Python still runs there, and takes what was compiled for it along.
    """

    def __init__(self, function: Callable[P, R], *, shapeless: bool = False) -> None:
        self._compiled: Callable[P, R] = mx.compile(function, shapeless=shapeless)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._compiled(*args, **kwargs)
