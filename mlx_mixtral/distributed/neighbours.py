"""Whether the connections of MLX's ring still stand.

MLX's ring counts errors of a connection, fails what waits for it then, and never ends what is asked of it afterwards: whoever
evaluates a sum in that moment waits for ever, and no exception comes. So somebody else has to look.
"""

from __future__ import annotations

import os
import socket
import stat
import weakref

from mlx_mixtral.distributed.environment import group_backend, ring_hosts

__all__ = ["Neighbours"]


class Neighbours:
    """The machines before and behind this one in the ring, and their connections; none for other backends.

    Made once the group has been joined.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._sockets: list[tuple[int, socket.socket]] = []
        weakref.finalize(self, _close, self._sockets)
        if group_backend() != "ring":
            return
        ports = [{int(str(address).rpartition(":")[2]) for address in host} for host in ring_hosts()]
        left, right = (rank - 1) % size, (rank + 1) % size
        for each in _connections():
            own, other = each.getsockname()[1], each.getpeername()[1]
            # Every machine accepts its left neighbour at its own address, and connects to its right one's.
            if other in ports[right]:
                self._sockets.append((right, each))
            elif own in ports[rank]:
                self._sockets.append((left, each))
            else:
                each.close()

    def lost(self) -> int | None:
        """The rank of a neighbour whose connection has ended; None while all stand."""
        for rank, each in self._sockets:
            try:
                if not each.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return rank
            except BlockingIOError:
                continue
            except OSError:
                return rank
        return None


def _close(sockets: list[tuple[int, socket.socket]]) -> None:
    for _, each in sockets:
        each.close()


def _connections() -> list[socket.socket]:
    """This process's TCP connections, each as a second descriptor of it."""
    found = []
    for name in os.listdir("/dev/fd"):  # noqa: PTH208
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            each = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            if each.family not in (socket.AF_INET, socket.AF_INET6) or each.type != socket.SOCK_STREAM:
                raise OSError
            each.getpeername()
        except OSError:
            each.close()
            continue
        found.append(each)
    return found
