"""Who fits beside whom: rows, rotary frequencies, and columns of cache."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mixtral.cache.batch import BatchCache
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.errors import ContextLengthError
from mlx_mixtral.generation.prompts import PromptJob, go_together
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.rows import BatchRow, Prefixes
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["Room"]


class Room:
    """The bounds of a batch.

    Args:
        max_rows: generations at once.
        max_columns: of all caches of rows together; None for no limit.
        prefixes: what else lies in that memory, if it is borrowed.
    """

    def __init__(
        self, model: MixtralModel, max_rows: int, max_columns: int | None, prefixes: Prefixes | None = None
    ) -> None:
        self._model, self._max_rows, self._max_columns, self._prefixes = model, max_rows, max_columns, prefixes
        self._column_bytes = model.kv.bytes_per_token(model.config, model.dtype.size)

    def check(self, request: Request) -> None:
        """That a request fits when it is alone.

        Raises:
            ContextLengthError: it does not.
        """
        # The last token is never fed.
        columns = self._columns(len(request.tokens) + request.max_tokens - 1)
        if self._max_columns is not None and columns > self._max_columns:
            raise ContextLengthError(
                f"a row of {len(request.tokens)} prompt tokens and up to {request.max_tokens} more needs KV cache for "
                f"{columns}; the memory budget holds {self._max_columns}: reserve more with context=, or generate fewer"
            )

    def is_alone(self, request: Request) -> bool:
        """Whether a row may get so long that its rotary frequencies are others than those of the rows beside it."""
        return self._model.config.rope.table_of(len(request.tokens) + request.max_tokens) != 0

    def fits(
        self,
        cache: BatchCache,
        rows: Sequence[BatchRow],
        jobs: Sequence[PromptJob],
        shared: int,
        joining: Sequence[BatchRow],
    ) -> bool:
        """Whether ``joining`` can begin together beside what runs, which may grow by a token.

        Args:
            shared: tokens of prompts that wait for the last of their rows.
        """
        coming = [*(row for job in jobs for row in job.rows if not row.is_finished), *joining]
        count = len(rows) + len(coming)
        if count > self._max_rows or (count > 1 and any(row.is_alone for row in (*rows, *coming))):
            return False
        if len(joining) > 1:
            if not go_together(self._model, [len(row.tokens) for row in joining]):
                return False
            # The rows of a prompt's cache have one adapter.
            if any(row.request.adapter != joining[0].request.adapter for row in joining):
                return False
            # One that goes on from an earlier prompt has other columns than those beside it.
            if any(row.made or self.reusable(row) for row in joining):
                return False
        if self._max_columns is None or count == 1:
            return True
        wanted = [self._wanted(row) - 1 for row in coming]
        return cache.columns_with(wanted) + self._columns(shared) <= self._max_columns

    def reusable(self, row: BatchRow) -> int:
        """Tokens of its prompt that need not be computed."""
        if self._prefixes is None:
            return 0
        return self._prefixes.reusable(row.tokens, self._model.min_prompt_tokens, row.request.adapter)

    def claim(self, cache: BatchCache, jobs: Sequence[PromptJob], shared: int) -> bool:
        """Take back what rows need of borrowed memory; whether the next step needs more columns than there are."""
        if self._max_columns is None:
            return False
        computing = sum(len(job.rows) * self._columns(job.reused + job.length) for job in jobs)
        left = self._max_columns - cache.columns_with([]) - computing - self._columns(shared)
        if self._prefixes is not None and self._prefixes.is_borrowed:
            self._prefixes.shrink(max(left, 0) * self._column_bytes)
        return left < 0

    def keeps(self, cache: BatchCache, tokens: int) -> bool:
        """Whether so many tokens of a row that ends may be copied and kept."""
        if self._prefixes is None:
            return False
        if self._max_columns is None or not self._prefixes.is_borrowed:
            return True
        return cache.columns_with([]) + self._columns(tokens) <= self._max_columns

    def _columns(self, tokens: int) -> int:
        return self._model.kv.columns(self._model.config, tokens)

    @staticmethod
    def _wanted(row: BatchRow) -> int:
        """Tokens there has to be room for when a row begins: its prompt and a step; all of it when it had to stop before."""
        most = row.request.max_tokens
        return len(row.tokens) + (most if row.made else min(most, STEP_TOKENS)) - 1
