"""Connections of this process that another program opened in it, seen from outside: whether their other end is gone.

MLX's ring notices a lost connection when it sends or receives; what waits for a result at that moment is not always woken.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Iterator

__all__ = ["Connections", "new_connections"]

_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL | getattr(select, "POLLRDHUP", 0)


class Connections:
    """Sockets by their numbers, which stay somebody else's."""

    def __init__(self, numbers: frozenset[int] = frozenset()) -> None:
        self._numbers = numbers

    @property
    def is_broken(self) -> bool:
        """Whether one of them has lost its other end, or was closed after it had."""
        return any(map(_is_gone, self._numbers))


@contextlib.contextmanager
def new_connections(found: list[Connections]) -> Iterator[None]:
    """Within the block connections are opened; they are put into ``found``."""
    before = _connected()
    yield
    found.append(Connections(_connected() - before))


def _connected() -> frozenset[int]:
    numbers = set()
    for name in os.listdir("/dev/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError, ValueError):
            number = int(name)
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as copy:
                    copy.getpeername()
                numbers.add(number)
    return frozenset(numbers)


def _is_gone(number: int) -> bool:
    poll = select.poll()
    poll.register(number, getattr(select, "POLLRDHUP", 0))
    if any(events & _GONE for _, events in poll.poll(0)):
        return True
    # Where the system has no such event, an end of the stream is seen by looking, if nothing lies before it.
    try:
        with socket.socket(fileno=os.dup(number)) as copy:
            return not copy.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
