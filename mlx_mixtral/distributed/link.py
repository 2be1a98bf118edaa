"""What the machines of a group tell each other: the leader's forwards, and what happened to its caches since the last one.

The leader alone runs the program: prompts, sampling, batches, speculation, constraints, whatever is timed or random. The
others hold their parts of the weights and of every cache, and repeat each forward of the leader with the same tokens. So they
have nothing to decide, and nothing they do can differ. A message is a list of int32: records of a number for what is done, the
count of its arguments, and these. Changes of caches wait for the next forward and travel with it; a decode step and all that
came before it is one sum of 256 bytes, the tokens of which need not be known to the host yet.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.distributed.group import Group
from mlx_mixtral.distributed.shares import Share

__all__ = ["OPS", "Link", "Record", "is_lost", "records"]

OPS = (
    "cache", "batch", "fork", "take", "row", "extract", "trim", "join", "keep", "take_back", "drop",
    "hidden", "remember", "step", "collect", "spread", "time", "end",
)  # fmt: skip
PACKET = 64
Record = tuple[str, list[int]]


class Link:
    """One machine's end of it.

    Args:
        shares: what each machine holds, by rank.
    """

    def __init__(self, group: Group, shares: Sequence[Share]) -> None:
        self.group, self.shares = group, list(shares)
        self.share = self.shares[group.rank]
        self._waiting: deque[Record] = deque()
        self._ids: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._last_id = 0

    @property
    def is_leader(self) -> bool:
        return self.group.is_leader

    # Caches, of the leader

    def made(self, how: str, cache: Any, source: Any, *numbers: int) -> None:
        """As ``cache.mirror.Mirror`` has it."""
        if not self.is_leader:
            return
        self._last_id += 1
        # A copy has the number of what it was copied from.
        self._ids[cache] = own = self._last_id
        weakref.finalize(cache, self._waiting.append, ("drop", [own])).atexit = False
        self._waiting.append((how, [own, 0 if source is None else self._ids[source], *map(int, numbers)]))

    def did(self, act: str, cache: Any, other: Any, *numbers: int) -> None:
        """As ``cache.mirror.Mirror`` has it."""
        if self.is_leader:
            ids = [self._ids[cache], 0 if other is None else self._ids[other]]
            self._waiting.append((act, [*ids, *map(int, numbers)]))

    # Forwards

    @contextlib.contextmanager
    def forward(self, kind: str, cache: Any, tokens: mx.array, *numbers: int) -> Iterator[mx.array]:
        """One forward: within the block it is scheduled, over the tokens ``[B, L]`` that are given.

        The leader sends it first. Ctrl-C waits for the end of the block, and an error in it ends the group: the others have
        begun what is not carried out here.

        Raises:
            GroupError: the group has ended.
        """
        if not self.is_leader:
            yield tokens
            return
        with self._whole():
            yield self._send(kind, [self._ids[cache], *map(int, numbers), *tokens.shape], tokens)

    @contextlib.contextmanager
    def order(self, kind: str, cache: Any = None, *numbers: int) -> Iterator[None]:
        """As ``forward``, for what has no tokens."""
        if not self.is_leader:
            yield
            return
        with self._whole():
            self._send(kind, [0 if cache is None else self._ids[cache], *map(int, numbers)], None)
            yield

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around whatever waits for results: the deadline runs, and a lost connection has one message.

        Raises:
            GroupError: another machine was lost.
        """
        self.group.check()
        try:
            with self.group.deadline.armed("the other machines"):
                yield
        except RuntimeError as error:
            if not is_lost(error):
                raise
            others = "rank 1" if self.group.size == 2 and self.is_leader else "another machine"
            self.group.give_up(
                f"rank {self.group.rank} of {self.group.size}: the connection to {others} was lost; see what it said last, and "
                "start all again"
            )
            self.group.check()

    def end(self) -> None:
        """Tell the others that nothing follows; after a failure they know."""
        if not self.is_leader or self.group.is_broken:
            return
        with self.guarded(), self.order("end"):
            pass
        mx.synchronize(self.group.stream)
        self.group.give_up("this model was closed; load it again")

    def receive(self) -> tuple[list[Record], list[int]]:
        """Of the others: wait for the leader's next message; its records, and the tokens of the last."""
        packet = self.group.sum(mx.zeros(PACKET, mx.int32))
        mx.eval(packet)
        total, *numbers = np.asarray(packet).tolist()
        if total >= PACKET:
            rest = self.group.sum(mx.zeros(total, mx.int32))
            mx.eval(rest)
            numbers = np.asarray(rest).tolist()
        return records(numbers[:total])

    def _send(self, kind: str, numbers: list[int], tokens: mx.array | None) -> mx.array:
        waiting: list[Record] = []
        while self._waiting:
            waiting.append(self._waiting.popleft())
        ints = [number for name, own in [*waiting, (kind, numbers)] for number in (OPS.index(name), len(own), *own)]
        count = 0 if tokens is None else tokens.size
        total, first = len(ints) + count, [len(ints) + count]
        flat = mx.zeros(0, mx.int32) if tokens is None else tokens.astype(mx.int32).reshape(-1)
        if total < PACKET:
            first += ints
            pad = mx.zeros(PACKET - 1 - total, mx.int32)
            sent, start = self.group.sum(mx.concatenate([mx.array(first, mx.int32), flat, pad])), len(first)
        else:
            head = self.group.sum(mx.array(first + [0] * (PACKET - 1), mx.int32))
            mx.async_eval(head)
            sent, start = self.group.sum(mx.concatenate([mx.array(ints, mx.int32), flat])), len(ints)
        # At once: collectives come in the order of the messages.
        mx.async_eval(sent)
        self.group.deadline.progress()
        # The forward follows from what was sent, and so its own sums come after it.
        return sent[start : start + count].reshape(() if tokens is None else tokens.shape) if count else sent

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        self.group.check()
        with _no_interrupt():
            try:
                yield
            except BaseException:
                self.group.give_up(
                    "this machine failed in the middle of a step, and the others cannot go on without it; start all again"
                )
                raise


def is_lost(error: BaseException) -> bool:
    """Whether an error of MLX says that another machine is gone."""
    said = str(error)
    return any(name in said for name in ("[ring]", "[jaccl]", "[nccl]", "[mpi]"))


def records(numbers: Sequence[int]) -> tuple[list[Record], list[int]]:
    """A message's records, and the tokens of the last one, whose shape its last two arguments are."""
    found: list[Record] = []
    at = 0
    while at < len(numbers):
        name, count = OPS[numbers[at]], numbers[at + 1]
        found.append((name, list(numbers[at + 2 : at + 2 + count])))
        at += 2 + count
        if name in ("hidden", "remember", "step", "collect", "spread", "time", "end"):
            break
    return found, list(numbers[at:])


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C acts after the block, where this is the thread that it interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
