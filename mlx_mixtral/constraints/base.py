"""What a decode loop knows of a constraint: a mask of allowed tokens, and the tokens that were drawn under it.

A loop does the same for every row at every step:

1. Schedule the forward that gives the row's logits; ``mask_into`` runs on the host meanwhile.
2. Draw the row's token where the mask has ones, after penalties and before temperature.
3. ``accept`` the token. What it returns is the row's token: near ``max_tokens`` it may be another one than was drawn, where the
   drawn one would leave no way to finish. A forward that has begun with the drawn token is then taken back (``cache.trim(1)``)
   and computed with the one that stays.
4. End the row once ``is_complete``, without waiting for an end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

__all__ = ["ALL_ALLOWED", "Constraint", "is_allowed", "mask_words", "masks_along"]

WORD_BITS = 32
ALL_ALLOWED = np.int32(-1)
"""A word of a mask that allows its 32 tokens: rows without a constraint are full of them."""


class Constraint(Protocol):
    """The state of one row's constraint. Used by one thread at a time.

    Raises:
        ConstraintError: by any method: the constraint cannot be kept. The row ends with the error; it is never continued
            without the constraint.
    """

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow it."""

    @property
    def was_cut(self) -> bool:
        """Whether a token was replaced so that the text is whole within ``max_tokens``: the reason it ends is "length"."""

    def mask_into(self, row: npt.NDArray[np.int32]) -> None:
        """Fill ``row [ceil(V / 32)]``: bit ``token % 32`` of word ``token // 32`` is set where the token may come next.

        The state stays as it is. At least one bit is set unless ``is_complete``; end-of-sequence ids have theirs set where
        the text may end here.
        """

    def accept(self, token: int) -> int:
        """The row goes on with ``token``, which the mask allowed, or with the token returned, which stands in its place."""

    def fork(self) -> Self:
        """Another one in the same state, for tokens that may be taken back. Costs microseconds."""


def mask_words(vocab_size: int) -> int:
    """Words of a row for a vocabulary of this size."""
    return -(-vocab_size // WORD_BITS)


def is_allowed(row: npt.NDArray[np.int32], token: int) -> bool:
    """Whether a row's bit of ``token`` is set."""
    return bool(int(row[token // WORD_BITS]) >> (token % WORD_BITS) & 1)


def masks_along(constraint: Constraint, tokens: Sequence[int], rows: npt.NDArray[np.int32]) -> None:
    """Fill ``rows [len(tokens) + 1, ceil(V / 32)]``: the masks before each of ``tokens``, and after the last.

    ``constraint`` stays as it is. Behind a token that its mask does not allow, that would be replaced, or that completes the
    text, no mask means anything: those rows allow all.
    """
    rows[:] = ALL_ALLOWED
    ahead = constraint.fork()
    for row, token in zip(rows, (*tokens, None), strict=True):
        ahead.mask_into(row)
        if token is None or not is_allowed(row, token) or ahead.accept(token) != token or ahead.is_complete:
            return
