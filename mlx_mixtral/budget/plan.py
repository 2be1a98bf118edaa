"""The plan in force: what a budget holds, and which experts stay in memory under it. All numbers, nothing to compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mlx_mixtral.budget.needs import MemoryNeeds
from mlx_mixtral.budget.slots import ResidencyPlan

__all__ = ["MemoryPlan"]


@dataclass(frozen=True)
class MemoryPlan:
    """What a loaded model takes, and may take: ``engine.plan``.

    Args:
        budget_bytes: what was asked for, or what the machine can give where that binds; None where nothing does.
        context_tokens: tokens that KV cache is reserved for.
        context_capacity: tokens a sequence can have: ``context_tokens`` in whole steps, or the model's own context where a
            window bounds the cache.
        kv_columns: tokens the KV cache is allocated for at most; rows of a batch share them.
        kv_bytes: bytes of that cache.
        chunk_tokens: tokens of a prompt computed at once.
        working_bytes: what computing a chunk takes for a while, and what reading experts takes.
        min_bytes: the smallest budget the model can do with, for this context.
        resident_bytes: what it takes with all experts in memory.
        residency: slots of every layer, and what they are predicted to give; None where all experts stay in memory.
    """

    budget_bytes: int | None
    context_tokens: int
    context_capacity: int
    kv_columns: int
    kv_bytes: int
    chunk_tokens: int
    working_bytes: int
    min_bytes: int
    resident_bytes: int
    residency: ResidencyPlan | None

    @classmethod
    def of(
        cls, needs: MemoryNeeds, budget_bytes: int | None, chunk_tokens: int, residency: ResidencyPlan | None
    ) -> Self:
        """The plan that follows from what a model needs and how much of a prompt is computed at once."""
        return cls(
            budget_bytes,
            needs.context_tokens,
            needs.context_capacity,
            needs.kv_columns,
            needs.kv_bytes,
            chunk_tokens,
            needs.working_bytes(chunk_tokens) + needs.reading_bytes,
            needs.min_bytes,
            needs.resident_bytes,
            residency,
        )

    @property
    def is_bound(self) -> bool:
        """Whether there is a budget to keep to."""
        return self.budget_bytes is not None or self.residency is not None

    @property
    def slots(self) -> tuple[int, ...] | None:
        """Expert slots of every layer; None where all experts stay in memory."""
        return None if self.residency is None else self.residency.slots

    @property
    def overflow_slots(self) -> Mapping[int, int]:
        """Slots of the banks that layers of a kind share, by kind."""
        return {} if self.residency is None else self.residency.overflow_slots

    @property
    def tok_s(self) -> float | None:
        """Predicted speed of decoding; None where nothing is streamed."""
        return None if self.residency is None else self.residency.tok_s
