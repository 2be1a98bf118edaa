"""What stands between the decode loop and those that propose tokens to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.generation.sampling import Sampler

__all__ = ["Guess", "Proposal", "Proposer"]


@dataclass(frozen=True)
class Guess:
    """That something can be proposed now, before it costs anything.

    ``kind`` keeps apart guesses that are not equally good; acceptance is measured for each. ``token`` is the first token of
    a proposal where that is known already: compared with what is generated, it tells acceptance without a proposal.
    """

    kind: int
    token: int | None = None


@dataclass(frozen=True)
class Proposal:
    """``tokens [k]`` int32, and the log-probabilities ``[k, V]`` they were drawn with; None where nothing was drawn."""

    tokens: mx.array
    log_probabilities: mx.array | None = None


class Proposer(Protocol):
    """Follows a sequence, from the prompt on, and proposes how it goes on."""

    def guess(self) -> Guess | None:
        """What ``propose`` would start with now; None when it has nothing to propose."""

    def propose(self, count: int, sampler: Sampler, constraint: Constraint | None = None) -> Proposal:
        """``count`` tokens to follow what was taken so far.

        ``sampler`` and ``constraint`` are where the model's own sampling stands; they stay as they are. A token that
        ``constraint`` does not allow may be proposed and is refused.
        """

    def take(self, tokens: Sequence[int], accepted: int = 0) -> None:
        """The sequence goes on with ``tokens``, of which the first ``accepted`` were proposed just now."""
