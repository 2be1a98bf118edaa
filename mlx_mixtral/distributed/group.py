"""The group of machines: the only place that calls MLX's collectives (``mx.distributed``).

All of them run on one CPU stream, in the order in which they are evaluated, which has to be the same on every machine: another
order gives wrong sums and no error. So whoever adds one makes it depend on the one before, or evaluates at once.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from mlx_mixtral.distributed.deadline import Deadline, start_deadline
from mlx_mixtral.distributed.environment import group_backend, group_rank
from mlx_mixtral.distributed.neighbours import Neighbours
from mlx_mixtral.errors import GroupError

__all__ = ["DEFAULT_PEER_TIMEOUT_S", "Group", "join_group"]

TEXT_BYTES = 4096
START_S = 50.0
DEFAULT_PEER_TIMEOUT_S = 60.0


def join_group(timeout_s: float = START_S) -> mx.distributed.Group | None:
    """Join the group that MLX's environment names (``mlx.launch`` sets it); None where there is none.

    Waits for all machines. When one of them is missing after ``timeout_s``, the process is killed after a line on stderr: MLX
    waits without end, and holds the interpreter's lock.

    Raises:
        GroupError: the group cannot be formed.
    """
    backend = group_backend()
    if backend is None:
        return None
    rank = group_rank()
    waits = (
        f"rank {rank}: not all machines of the group answered within {timeout_s:g} s; start the same command on each, and see "
        "that their addresses and ports can be reached"
    )
    with start_deadline(timeout_s, waits):
        try:
            return mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as error:
            raise GroupError(f"rank {rank}: the group cannot be formed: {' '.join(str(error).split())[:300]}") from None


class Group:
    """Machines that compute one model together.

    Args:
        group: of MLX.
        timeout_s: how long another machine may take for its part of the work before this process ends.
    """

    def __init__(self, group: mx.distributed.Group, timeout_s: float) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.stream = mx.new_thread_unsafe_stream(mx.Device(mx.cpu))
        self.neighbours = _neighbours(self.rank, self.size)
        self.deadline = Deadline(timeout_s, self.rank, self.size, self.neighbours.lost)
        self.sums = 0
        """Sums that were asked for, those of a compiled graph once."""
        self._broken: str | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this machine is the one that is asked, rank 0."""
        return self.rank == 0

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every machine's ``x``, lazy, the same bits on each; shapes and types must be equal."""
        self.sums += 1
        return mx.distributed.all_sum(x, group=self._group, stream=self.stream)

    def from_rank(self, rank: int, x: mx.array, after: mx.array | None = None) -> mx.array:
        """``x`` of machine ``rank``, lazy, on every machine; of the others only shape and type count.

        Args:
            after: the result of the collective before this one, where it is not part of ``x``.
        """
        if self.rank != rank:
            x = mx.zeros(x.shape, x.dtype)
            if after is not None:
                (x,) = mx.depends([x], [after])
        return self.sum(x)

    def texts(self, own: str) -> list[str]:
        """A short text of every machine, by rank. Waits for all of them."""
        data = own.encode()[:TEXT_BYTES]
        line = np.zeros((1, TEXT_BYTES + 4), np.uint8)
        line[0, :4] = np.frombuffer(len(data).to_bytes(4, "little"), np.uint8)
        line[0, 4 : 4 + len(data)] = np.frombuffer(data, np.uint8)
        with self.deadline.armed("the other machines"):
            found = mx.distributed.all_gather(mx.array(line), group=self._group, stream=self.stream)
            mx.eval(found)
        rows = np.asarray(found)
        lengths = [int.from_bytes(row[:4].tobytes(), "little") for row in rows]
        return [
            row[4 : 4 + length].tobytes().decode(errors="replace") for row, length in zip(rows, lengths, strict=True)
        ]

    def give_up(self, reason: str) -> None:
        """Nothing more can be computed together."""
        self._broken = self._broken or reason

    @property
    def is_broken(self) -> bool:
        """Whether ``give_up`` was called."""
        return self._broken is not None

    def check(self) -> None:
        """Raise GroupError after a failure."""
        if self._broken is not None:
            raise GroupError(self._broken)


@cache
def _neighbours(rank: int, size: int) -> Neighbours:
    """Of this process: MLX connects once, however many models are loaded."""
    return Neighbours(rank, size)
