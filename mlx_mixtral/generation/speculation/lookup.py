"""Prompt lookup: what followed the same words earlier, in the prompt or in the text generated so far, is proposed again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.proposal import Guess, Proposal

__all__ = ["LookupProposer", "NgramIndex"]


class NgramIndex:
    """Where each n-gram of a growing sequence was last followed by something; one dictionary entry an n-gram.

    After ``a b c a b`` the longest suffix seen before is ``a b``, at 0: what followed it there is ``c a b``. Copied further
    than the sequence goes it repeats: ``c a b c a b c …``, as a loop would.

    Args:
        max_ngram: longest suffix that is looked for.
    """

    def __init__(self, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_ngram)]
        self._match: tuple[int, int] | None = None

    def extend(self, tokens: Iterable[int]) -> None:
        """Append ``tokens``; constant time each."""
        held = self.tokens
        for token in tokens:
            # Only now does what ends here have a continuation: a suffix never finds itself.
            for n, after in enumerate(self._after, start=1):
                if n <= len(held):
                    after[tuple(held[-n:])] = len(held)
            held.append(token)
        self._match = self._longest()

    @property
    def match(self) -> int:
        """Length of the longest suffix that was seen before, at most ``max_ngram``; 0 for none."""
        return 0 if self._match is None else self._match[0]

    def continuation(self, count: int) -> list[int]:
        """The ``count`` tokens that followed it there; none without a match."""
        if self._match is None:
            return []
        at = self._match[1]
        period = len(self.tokens) - at
        return [self.tokens[at + offset % period] for offset in range(count)]

    def _longest(self) -> tuple[int, int] | None:
        for n in range(min(len(self._after), len(self.tokens)), 0, -1):
            at = self._after[n - 1].get(tuple(self.tokens[-n:]))
            if at is not None:
                return n, at
        return None


class LookupProposer:
    """Proposes continuations of an ``NgramIndex`` over prompt and output. Costs no arithmetic."""

    def __init__(self, prompt: Sequence[int], max_ngram: int) -> None:
        self._index = NgramIndex(max_ngram)
        self._index.extend(prompt)

    def guess(self) -> Guess | None:
        """The length of the match says how far to trust it."""
        return Guess(self._index.match, self._index.continuation(1)[0]) if self._index.match else None

    def propose(self, count: int, sampler: Sampler, constraint: Constraint | None = None) -> Proposal:
        return Proposal(mx.array(self._index.continuation(count), mx.int32))

    def take(self, tokens: Sequence[int], accepted: int = 0) -> None:
        self._index.extend(tokens)
