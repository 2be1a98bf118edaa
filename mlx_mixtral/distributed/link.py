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
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.distributed.group import Group
from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.errors import GroupError

__all__ = ["OPS", "Link", "Record", "is_lost", "records"]

OPS = (
    "cache", "batch", "fork", "take", "row", "extract", "trim", "join", "keep", "take_back", "drop",
    "hidden", "remember", "step", "collect", "spread", "time", "tick", "end",
)  # fmt: skip
PACKET = 64
MAX_TICK_S = 10.0
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
        self._turn = threading.Lock()
        self._ends = threading.Event()
        self._sent_at = time.monotonic()
        self._ticking = threading.Thread(target=self._tick, name="mlx-mixtral-tick", daemon=True)

    def start(self) -> None:
        """Of the leader, once all have loaded: from now on something is sent several times in every ``timeout_s``.

        So the others need not wait for a leader that is gone: a connection that broke while nothing was sent over it is not
        always noticed by MLX.
        """
        if self.is_leader:
            self._ticking.start()

    @property
    def is_leader(self) -> bool:
        return self.group.is_leader

    @property
    def kept_share(self) -> Fraction:
        """This machine's bytes of a token's keys and values, in those of the machine that has the most of them."""
        return Fraction(len(self.share.layers), max(len(each.layers) for each in self.shares))

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
            self.group.give_up(self._lost)
            raise GroupError(self._lost) from None

    def look(self) -> None:
        """While nothing is computed: raise GroupError where a machine was lost."""
        if self.group.neighbours.lost() is not None:
            self.group.give_up(self._lost)
        self.group.check()

    def end(self) -> None:
        """Tell the others that nothing follows; after a failure they know."""
        if not self.is_leader or self.group.is_broken:
            return
        self._ends.set()
        with self.guarded(), self.order("end"):
            pass
        mx.synchronize(self.group.stream)
        self.group.give_up("this model was closed; load it again")

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around what gives everything back: that another machine is lost was said, or is of no interest any more."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost(error):
                raise
            self.group.give_up(self._lost)
        finally:
            self._ends.set()
            self.group.deadline.stop()

    def receive(self) -> tuple[list[Record], list[int]]:
        """Of the others: wait for the leader's next message; its records, and the tokens of the last."""
        packet = self.group.sum(mx.zeros(PACKET, mx.int32))
        with self.group.deadline.armed("rank 0"):
            mx.eval(packet)
        total, *numbers = np.asarray(packet).tolist()
        if total >= PACKET:
            rest = self.group.sum(mx.zeros(total, mx.int32))
            with self.group.deadline.armed("rank 0"):
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
        self._sent_at = time.monotonic()
        # The forward follows from what was sent, and so its own sums come after it.
        return sent[start : start + count].reshape(() if tokens is None else tokens.shape) if count else sent

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        self.group.check()
        with _no_interrupt(), self._turn:
            try:
                yield
            except BaseException as error:
                self.group.give_up(
                    self._lost
                    if is_lost(error)
                    else "this machine failed in the middle of a step, and the others cannot go on without it; start all again"
                )
                raise

    def _tick(self) -> None:
        """Say something now and then while nothing is computed."""
        every_s = min(MAX_TICK_S, self.group.deadline.timeout_s / 4)
        while not self._ends.wait(every_s / 2):
            if time.monotonic() - self._sent_at < every_s or not self._turn.acquire(blocking=False):
                continue
            try:
                if not self.group.is_broken and not self._ends.is_set():
                    mx.eval(self._send("tick", [0], None))
            except RuntimeError:
                # Whoever uses the group next is told.
                self.group.give_up(self._lost)
                return
            finally:
                self._turn.release()

    @property
    def _lost(self) -> str:
        lost = self.group.neighbours.lost()
        others = "another machine" if lost is None else f"rank {lost}"
        return (
            f"rank {self.group.rank} of {self.group.size}: the connection to {others} was lost; see what it said last, and "
            "start all again"
        )


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
        if name in ("hidden", "remember", "step", "collect", "spread", "time", "tick", "end"):
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
