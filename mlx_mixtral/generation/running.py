"""The rows that run: their cache, their last tokens, and the step that gives each its next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mixtral.cache.batch import BatchCache
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.drawing import draw
from mlx_mixtral.generation.rows import BatchRow, RowUpdate
from mlx_mixtral.generation.sampling import Sampled

__all__ = ["RunningRows"]


class RunningRows:
    """Rows whose prompts are computed, in the order in which they joined.

    A step has two halves: ``forward`` schedules the logits after every row's last token, ``draw`` the tokens drawn from them.
    Between the two the host reads the last tokens and fills masks, while the device computes.
    """

    def __init__(self, context: DecodeContext) -> None:
        self._context = context
        self.reset()

    def reset(self) -> None:
        """Without any rows."""
        empty = self._context.model.make_cache()
        self.rows: list[BatchRow] = []
        self.cache = BatchCache(empty.storage, empty.window, mirror=empty.mirror)
        self.logits: mx.array | None = None
        """Of a forward that was scheduled and whose tokens are not drawn, ``[B, V]``."""
        self.is_drawn = True
        """Whether the next token of every row is drawn."""
        self.last = mx.zeros(0, mx.int32)
        """The last token of every row ``[B]``, which is fed next."""

    @property
    def waits_for_masks(self) -> bool:
        """Whether tokens can only be drawn when the last ones were read."""
        return any(row.is_constrained or row.reads_tokens for row in self.rows)

    @property
    def waits_for_logits(self) -> bool:
        """Whether drawing tokens waits for the device."""
        return any(row.reads_tokens for row in self.rows)

    @property
    def reading(self) -> list[tuple[BatchRow, Sampled]]:
        """Rows with the token that each is to be given."""
        return [(row, row.unread) for row in self.rows if row.unread is not None and not row.is_finished]

    def forward(self) -> None:
        """Schedule the logits after the last token of every row."""
        self.is_drawn = False
        self.logits = self._context.step(self.last[:, None], self.cache)[:, -1]

    def draw(self) -> None:
        """Schedule the next token of every row."""
        assert self.logits is not None
        self.last, self.logits, self.is_drawn = draw(self.rows, self.logits), None, True
        mx.async_eval(self.last, *[array for row in self.rows if row.unread for array in row.unread.arrays])

    def read(self, row: BatchRow, sampled: Sampled) -> RowUpdate:
        """Wait for a token that was drawn."""
        update, replaced = row.read(sampled)
        if replaced is None or row not in self.rows or row.is_finished:
            return update
        place = self.rows.index(row)
        self.last = mx.concatenate([self.last[:place], mx.array([replaced], mx.int32), self.last[place + 1 :]])
        if self.logits is not None:
            # The forward under way has the token that was drawn: the other one is fed in its place at the next step.
            self.cache.take_back(place)
            row.replay.appendleft(replaced)
        return update

    def join(
        self, rows: Sequence[BatchRow], logits: mx.array, cache: KVCache, places: Sequence[int], *, keep: bool = False
    ) -> None:
        """Rows whose prompts, at ``places`` of ``cache``, are computed, and followed by ``logits [R, V]``."""
        for row in rows:
            row.replay.extend(row.generated)
        tokens = draw(rows, logits)
        mx.async_eval(tokens)
        self.add(rows, tokens, cache, [(at, len(row.tokens)) for at, row in zip(places, rows, strict=True)], keep=keep)

    def add(
        self,
        rows: Sequence[BatchRow],
        tokens: mx.array,
        cache: KVCache,
        members: Sequence[tuple[int, int]],
        *,
        keep: bool = False,
    ) -> None:
        """Rows that go on with ``tokens [R]``, their caches as ``BatchCache.join`` takes them."""
        self.cache.join(cache, members, keep=keep)
        self.last = mx.concatenate([self.last, tokens]) if self.rows else tokens
        self.rows += rows

    def keep(self, stays: Callable[[BatchRow], bool], leaves: Callable[[BatchRow, int], None]) -> None:
        """Drop all rows but those that stay; each of the others is told to ``leaves`` with its place, before it is gone."""
        places = [place for place, row in enumerate(self.rows) if stays(row)]
        if len(places) == len(self.rows):
            return
        for place, row in enumerate(self.rows):
            if not stays(row):
                leaves(row, place)
        self.rows = [self.rows[place] for place in places]
        if not self.rows:
            self.reset()
            return
        kept = mx.array(places, mx.int32)
        self.last = self.last[kept]
        if self.logits is not None:
            self.logits = self.logits[kept]
        self.cache.keep(places)
