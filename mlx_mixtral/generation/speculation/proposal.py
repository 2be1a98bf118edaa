"""What stands between the decode loop and those that propose tokens to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.generation.sampling import Sampler

__all__ = ["Guess", "Proposal", "Proposer", "SpeculationStats"]


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

    def propose(self, count: int, sampler: Sampler) -> Proposal:
        """``count`` tokens to follow what was taken so far; ``sampler`` is where the model's own sampling stands."""

    def take(self, tokens: Sequence[int], accepted: int = 0) -> None:
        """The sequence goes on with ``tokens``, of which the first ``accepted`` were proposed just now."""


@dataclass
class SpeculationStats:
    """What speculation did in a generation so far, after its first token."""

    forwards: int = 0
    """Forwards of the model."""
    tokens: int = 0
    """Tokens they gave."""
    proposed: int = 0
    accepted: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """1 without speculation."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted; of those after the first wrong one none is."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def to_dict(self) -> dict[str, float | int]:
        return {
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "proposed_tokens": self.proposed,
            "accepted_tokens": self.accepted,
            "acceptance": self.acceptance,
        }
