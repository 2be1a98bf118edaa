"""A compiled grammar, and the state of one text under it: ``Constraint`` over an llguidance matcher."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from mlx_mixtral.constraints.base import is_allowed
from mlx_mixtral.constraints.closing import MAX_WAY_TOKENS, Closing, ClosingRanks, Way
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import ConstraintError

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["CompiledConstraint", "GrammarConstraint"]

# Tokens tried one by one where each has to leave a way to the end; of more than these the way itself is taken.
MAX_TRIED = 32
# For the way of a whole text: a fraction of what a compilation may take.
MAX_FIND_S = 2.0
# By which a way may be too long to be shortened.
SPARE_TOKENS = 32
# Tokens within which the end of something loose is found, or it is left open.
LOST_TOKENS = 1024
# Masks computed to shorten the way: of a whole text once, and after a token.
FIRST_MASKS, NEXT_MASKS = 2000, 100


class CompiledConstraint:
    """A grammar over a vocabulary, ready for any number of texts at once.

    Args:
        matcher: at its start.
        is_json: whether its texts are JSON.
        examples: see ``examples.examples``.

    Attributes:
        warnings: What of a schema is not kept, a sentence each.
        min_tokens: Tokens of the shortest text found; None where none was.

    Raises:
        ConstraintError: not even its first mask can be computed.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: TokenTable,
        ranks: ClosingRanks,
        *,
        is_json: bool,
        is_loose: bool = False,
        examples: Sequence[str] = (),
        warnings: tuple[str, ...] = (),
    ) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._closing = Closing(vocabulary, ranks, is_json=is_json or is_loose, examples=examples)
        self._is_json, self._is_loose = is_json, is_loose
        self.warnings = warnings
        tried = matcher.deep_copy()
        tried.compute_bitmask()
        if tried.is_error():
            raise ConstraintError(
                f"the constraint is too complex ({tried.get_error()}); make it simpler: smaller counts"
            )
        self._way = self._closing.find(matcher, MAX_WAY_TOKENS, until_s=time.monotonic() + MAX_FIND_S)
        if self._way is None and not is_json:
            self.warnings += ("no way to the end was found: a text that max_tokens ends may be half of one",)

    @property
    def min_tokens(self) -> int | None:
        return None if self._way is None else len(self._way)

    def begin(self, max_tokens: int) -> GrammarConstraint:
        """The constraint of one text of at most ``max_tokens`` tokens, whole also where the model would write more.

        Raises:
            ConstraintError: no text as short as that was found.
        """
        if self._way is not None and len(self._way) > max_tokens:
            self._way = self._closing.shorten(self._matcher, self._way, max_tokens, FIRST_MASKS)
        if self._way is None and self._is_json:
            raise ConstraintError(
                f"no text of at most {MAX_WAY_TOKENS} tokens was found that keeps the schema; ask for fewer items or characters"
            )
        if self._way is not None and len(self._way) > max_tokens:
            raise ConstraintError(
                f"max_tokens is {max_tokens}, and the shortest text found that keeps the constraint has {len(self._way)} "
                "tokens; allow more"
            )
        matcher = self._matcher.deep_copy()
        return GrammarConstraint(
            matcher, self._vocabulary, self._closing, self._way, max_tokens, is_loose=self._is_loose
        )


class GrammarConstraint:
    """See ``Constraint``; made by ``CompiledConstraint.begin``.

    After each token it knows a way to the end that fits what is left of ``max_tokens``. A token after which none is found is
    replaced by the first of the way known.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: TokenTable,
        closing: Closing,
        way: Way | None,
        max_tokens: int,
        *,
        is_loose: bool = False,
    ) -> None:
        self._matcher, self._vocabulary, self._closing = matcher, vocabulary, closing
        self._way, self._left = way, max_tokens
        self._is_loose, self._is_lost = is_loose, False
        self._is_ended = self.was_cut = False

    @property
    def is_complete(self) -> bool:
        return self._is_ended or self._matcher.is_stopped()

    def fork(self) -> Self:
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def mask_into(self, row: npt.NDArray[np.int32]) -> None:
        row[:] = 0
        if self.is_complete:
            for token in self._vocabulary.eos_token_ids:
                self._allow(row, token)
            return
        words = self._vocabulary.table_words
        filled = row if row.size >= words and row.flags.c_contiguous else np.zeros(words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(filled.ctypes.data, words * 4)
        self._check()
        if filled is not row:
            row[:] = filled[: row.size]
        if self._way is not None and self.was_cut and len(self._way) == self._left:
            self._only_what_closes(row)
        if not row.any():
            # An end that no token of the vocabulary stands for.
            raise ConstraintError("no token of the vocabulary continues a text that keeps the constraint")

    def accept(self, token: int) -> int:
        if self.is_complete:
            raise ConstraintError(f"token {token} comes after the end of a text that keeps the constraint")
        if token in self._vocabulary.eos_token_ids:
            self._consume(token)
            self._is_ended = True
            return token
        if self._way is not None:
            way = self._way_after(token)
            if way is None and not (self._is_loose and self._is_lost):
                self.was_cut = True
                if not self._way:
                    return self._end()
                # The way known before goes on from here; that is what makes it right to take its first token.
                token, way = self._way[0], self._way[1:]
            self._way = way
        self._consume(token)
        self._left -= 1
        return token

    def _end(self) -> int:
        """The text ends here, where it may, in place of a token after which it might not any more."""
        if not self._vocabulary.eos_token_ids:
            raise ConstraintError("max_tokens ends the text where no token of the vocabulary can")
        return self.accept(self._vocabulary.end_token)

    def _consume(self, token: int) -> None:
        if not self._matcher.validate_tokens([token]):
            self._check()
            raise ConstraintError(
                f"token {token} cannot follow under the constraint; a logit_bias or a processor may have ruled out all that can"
            )
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint cannot be kept any further: {self._matcher.get_error()}")

    def _way_after(self, token: int) -> Way | None:
        """A way to the end after ``token`` that fits what is left; None where none is found, or the token may not come."""
        known, left = self._way, self._left - 1
        assert known is not None
        if known and token == known[0]:
            return known[1:]
        if not self._matcher.validate_tokens([token]):
            return known  # refused below
        if (end := self._end_after(token)) is not None:
            return end
        after = self._matcher.deep_copy()
        after.consume_token(token)
        limit = max(left + SPARE_TOKENS, LOST_TOKENS) if self._is_loose else left + SPARE_TOKENS
        way = self._closing.find(after, limit, known)
        self._is_lost = way is None
        if way is not None and len(way) > left:
            way = self._closing.shorten(after, way, left, NEXT_MASKS)
        return way if way is not None and len(way) <= left else None

    def _end_after(self, token: int) -> Way | None:
        """The same where the way known before, or what follows its first token, leads on after ``token``."""
        for end in (self._way[1:], self._way) if self._way else ((),):
            if len(end) < self._left and self._closing.leads(self._matcher, [token, *end]):
                return list(end)
        return None

    def _only_what_closes(self, row: npt.NDArray[np.int32]) -> None:
        """Leave the tokens that keep to the last possible way: nothing else would stay."""
        ids = self._closing.allowed(self._matcher)
        stay = [self._way[0]] if self._way else []
        if ids.size <= MAX_TRIED:
            stay += [int(token) for token in ids if self._end_after(int(token)) is not None]
        ends = [token for token in self._vocabulary.eos_token_ids if is_allowed(row, token)]
        row[:] = 0
        for token in (*stay, *ends):
            self._allow(row, token)

    @staticmethod
    def _allow(row: npt.NDArray[np.int32], token: int) -> None:
        row.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
