"""Generators that any thread may close, though another is in the middle of a step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, Protocol, Self, TypeVar

from mlx_mixtral.errors import BusyError

__all__ = ["Closable", "Steps"]

T = TypeVar("T")


class Closable(Protocol):
    """What generates, and ends when it is closed."""

    def close(self) -> None: ...


class Steps(Iterator[T], Generic[T]):
    """Iterates over ``generator``, one step at a time; dropping it closes the generator at once.

    Closed by another thread, it ends when the step under way is done, which still gives its value.

    Args:
        around: entered for each step.
    """

    def __init__(
        self,
        generator: Generator[T, None, None],
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._generator, self._around = generator, around
        self._turn = threading.Lock()
        self._stepping: int | None = None
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if not self._turn.acquire(blocking=False):
            if self._is_closed:
                raise StopIteration
            raise BusyError("this stream is already being read on another thread; read it on one at a time")
        try:
            if self._is_closed:
                raise StopIteration
            self._stepping = threading.get_ident()
            with self._around():
                return next(self._generator)
        finally:
            self._stepping = None
            if self._is_closed:
                self._generator.close()
            self._turn.release()

    def close(self) -> None:
        """End the generator, after the step under way. A callback within a step may call this, too. Again, it does nothing."""
        self._is_closed = True
        if self._stepping == threading.get_ident():
            return
        with self._turn:
            self._generator.close()
