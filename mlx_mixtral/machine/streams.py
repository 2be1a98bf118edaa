"""MLX streams that are used again: each keeps a thread of the operating system, which MLX never ends."""

from __future__ import annotations

import os
import weakref

import mlx.core as mx

from mlx_mixtral.errors import UnsupportedPlatformError
from mlx_mixtral.machine.device import Device

__all__ = ["StreamLease"]

_idle: dict[str, list[mx.Stream]] = {}
# The process whose threads compute, from the first stream on: a child that is forked from it has none of them.
_computing: list[int] = []


class StreamLease:
    """A stream on ``device`` that is nobody else's until this is closed or gone. What was scheduled on it must be done then.

    MLX streams belong to the thread that made them, except for this kind: a model may be loaded on one thread and used on
    another, and a generation be resumed from several, as long as it is one at a time. A thread that enters one gets a default
    stream from MLX besides, for good: a program that computes on the CPU does well to use few threads.

    Raises:
        UnsupportedPlatformError: this process was forked from one that computed.
    """

    def __init__(self, device: Device) -> None:
        _check_process()
        _computing[:] = [os.getpid()]
        # Lists change in one step, whatever thread a finalizer runs on.
        idle = _idle.setdefault(device.kind, [])
        try:
            self.stream = idle.pop()
        except IndexError:
            self.stream = mx.new_thread_unsafe_stream(device.mlx)
        self._end = weakref.finalize(self, idle.append, self.stream)
        self._end.atexit = False

    def check(self) -> None:
        """Raise UnsupportedPlatformError in a child that was forked from the process this was made in."""
        _check_process()

    def close(self) -> None:
        """Leave the stream to others. Does nothing the second time."""
        self._end()


def _check_process() -> None:
    if _computing and _computing[0] != os.getpid():
        raise UnsupportedPlatformError(
            f"this process was forked from process {_computing[0]} after a model was loaded there, and MLX's threads do not "
            "follow a fork; load models after forking, or start processes with multiprocessing's spawn method"
        )
