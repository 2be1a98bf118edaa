"""Requests that wait for their turn: in order, but for short ones that go ahead a few times."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlx_mixtral.generation.rows import BatchRow, SharedPrompt

__all__ = ["MAX_OVERTAKEN", "WaitingLine"]

MAX_OVERTAKEN = 4
"""How often others go ahead of a request that waits for more room than there is."""


class WaitingLine:
    """The queue. A row that was put back stands before all that came after it."""

    def __init__(self) -> None:
        self._rows: list[BatchRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BatchRow]:
        return iter(self._rows)

    def add(self, row: BatchRow) -> None:
        self._rows.append(row)

    def put_back(self, row: BatchRow) -> None:
        """Among those that wait, by its ticket."""
        later = (place for place, other in enumerate(self._rows) if other.ticket > row.ticket)
        self._rows.insert(next(later, len(self._rows)), row)

    def take_ready(self, fits: Callable[[BatchRow], bool]) -> BatchRow | None:
        """The first row whose prompt is computed already, if it fits."""
        row = next((row for row in self._rows if row.ready is not None), None)
        if row is None or not fits(row):
            return None
        self._rows.remove(row)
        return row

    @property
    def shared_tokens(self) -> int:
        """Tokens of all prompts that were computed for rows which wait."""
        found = {id(row.ready): row.ready.cache.length for row in self._rows if row.ready is not None}
        return sum(found.values())

    def shares(self, prompt: SharedPrompt) -> bool:
        """Whether another row waits that has this prompt."""
        return any(row.ready is prompt for row in self._rows)

    def drop_shared(self) -> bool:
        """Forget prompts that were computed for rows which wait: they are computed anew. False where there are none."""
        dropped = [row for row in self._rows if row.ready is not None]
        for row in dropped:
            row.ready = None
        return bool(dropped)

    def remove_finished(self) -> None:
        """Drop what was ended while it waited."""
        self._rows = [row for row in (row.successor() for row in self._rows) if not row.is_finished]

    def remove_expired(self, now: float) -> list[BatchRow]:
        """Take out those that have waited too long."""
        gone = [row for row in self._rows if row.deadline_s is not None and now >= row.deadline_s]
        self._rows = [row for row in self._rows if row not in gone]
        return gone

    def take(self, fits: Callable[[list[BatchRow]], bool], most_tokens: int | None = None) -> list[BatchRow]:
        """The next rows that go together and fit; none when it is nobody's turn.

        The first comes from the head of the queue. One that does not fit lets a shorter one that does go ahead, up to
        ``MAX_OVERTAKEN`` times; then all wait for it. ``most_tokens`` is the longest prompt that is wanted.
        """
        for place, row in enumerate(self._rows):
            ahead = self._rows[:place]
            if any(other.overtaken >= MAX_OVERTAKEN for other in ahead):
                return []
            is_short = all(_needed(row) < _needed(other) for other in ahead)
            is_wanted = most_tokens is None or len(row.tokens) <= most_tokens
            if row.ready is not None or not is_short or not is_wanted or not fits([row]):
                continue
            for other in ahead:
                other.overtaken += 1
            chosen = [row]
            for later in self._rows[place + 1 :]:
                if later.ready is not None or not fits([*chosen, later]):
                    break
                chosen.append(later)
            del self._rows[place : place + len(chosen)]
            return chosen
        return []


def _needed(row: BatchRow) -> int:
    """The most tokens it can come to."""
    return len(row.tokens) + row.request.max_tokens
