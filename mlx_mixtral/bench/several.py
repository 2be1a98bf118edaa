"""What a token of a model on several machines waits for: how many sums over all of them, and how long one takes here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mixtral.runtime.joining import sum_seconds
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["SumCost", "measure_sums"]

F32_BYTES = 4


@dataclass(frozen=True)
class SumCost:
    """Of one request's decode step.

    Args:
        sum_s: one sum of a token's states by itself. In a step a machine also waits for those that are not as far.
    """

    machines: int
    split: str
    sums_per_token: int
    sum_s: float

    @property
    def token_s(self) -> float:
        """Seconds of a token's sums."""
        return self.sums_per_token * self.sum_s

    def share(self, tok_s: float) -> float:
        """Of the time of a token, at a rate of decoding."""
        return self.token_s * tok_s

    def to_dict(self) -> dict[str, Any]:
        return {
            "machines": self.machines,
            "split": self.split,
            "sums_per_token": self.sums_per_token,
            "sum_s": self.sum_s,
            "sums_s_per_token": self.token_s,
        }


def measure_sums(model: Mixtral) -> SumCost | None:
    """Count the sums of one forward of one token, and time one of their size; None where the model is on one machine.

    Raises:
        GroupError: another machine was lost.
    """
    link, config = model.engine.link, model.config
    if link is None:
        return None
    with model.engine.computing() as context:
        cache = model.make_cache()
        counts = []
        # The first also carries what happened to other caches.
        for _ in range(2):
            before = link.group.sums
            mx.eval(context.model.hidden(mx.array([[0]], mx.int32), cache, last_only=True))
            counts.append(link.group.sums - before)
        numbers = config.hidden_size * context.model.dtype.size // F32_BYTES
        with link.order("time", None, numbers):
            seconds = sum_seconds(link.group, numbers)
    return SumCost(link.group.size, link.share.split, counts[-1], seconds)
