"""Which experts of a model stay in memory under a budget: needs, speeds and hit rates brought together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.budget.needs import DEFAULT_CONTEXT_TOKENS, RESIDENT_CHUNK_TOKENS, MemoryNeeds
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.slots import ModelSizes, Speeds, plan_residency
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.sizes import parse_size

__all__ = ["Planner"]


class Planner:
    """Plans which experts of a model stay in memory.

    Args:
        sizes: bytes of the model in memory and on disk.
        item_bytes: of a number in the compute type.
        reading_bytes: buffers of the threads that read experts.
        product_bytes: buffers of the threads that multiply.
        keeps_scores: whether attention holds the scores of a step, as on the CPU backend.
        kv: how keys and values are kept.
        available_bytes: what this machine can give, None where that is not known; asked when no budget is named.
        speeds: disk, memory and read-backs; measured, and asked for, once a budget cannot hold everything.
        hit_rates: ``[L, E + 1]`` by layer and slots; the same.
    """

    def __init__(
        self,
        config: MixtralConfig,
        sizes: ModelSizes,
        *,
        item_bytes: int,
        reading_bytes: int,
        product_bytes: int = 0,
        keeps_scores: bool,
        kv: KVOptions,
        available_bytes: Callable[[], int | None],
        speeds: Callable[[], Speeds],
        hit_rates: Callable[[], npt.NDArray[np.float64]],
    ) -> None:
        self.config, self.sizes, self.kv = config, sizes, kv
        self._item_bytes, self._keeps_scores = item_bytes, keeps_scores
        self._reading_bytes, self._product_bytes = reading_bytes, product_bytes
        self._available_bytes, self._measure, self._make_hit_rates = available_bytes, speeds, hit_rates
        self.adapter_bytes = 0
        """Of adapters that are in memory with the model, or are to be."""

    def needs(self, context: int | None) -> MemoryNeeds:
        """What the model needs beside experts, with ``context`` tokens of KV cache.

        Raises:
            InvalidRequestError, ContextLengthError: not a number of tokens the model can hold.
        """
        own = self.config.max_context_tokens
        if context is not None:
            check_integer("context", context, 1, wanted="a number of tokens, at least 1")
            self.config.check_context(context)
        tokens = context or min(own, DEFAULT_CONTEXT_TOKENS)
        return MemoryNeeds(
            self.config,
            self.sizes,
            tokens,
            self._item_bytes,
            self._keeps_scores,
            self._reading_bytes,
            self.kv,
            self._product_bytes,
            self.adapter_bytes,
        )

    def plan(self, memory: str | float | None, context: int | None) -> MemoryPlan:
        """What stays in memory under a budget; None means what this machine can give.

        Raises:
            InvalidRequestError, ContextLengthError: sizes that are none.
            MemoryBudgetError: the budget is below the least the model can do with.
            CheckpointError: an expert cannot be read to see how fast the disk is.
        """
        needs = self.needs(context)
        budget = self._available_bytes() if memory is None else parse_size(memory)
        if budget is None or needs.resident_bytes <= budget:
            return MemoryPlan.of(needs, None if memory is None else budget, RESIDENT_CHUNK_TOKENS, None)
        chunk = needs.chunk_tokens(budget)
        room = needs.room_for_experts(budget, chunk)
        if self.config.is_dense:
            return MemoryPlan.of(needs, budget, chunk, None)
        return MemoryPlan.of(needs, budget, chunk, plan_residency(self.sizes, room, self.speeds, self.hit_rates))

    def again(self, plan: MemoryPlan) -> MemoryPlan:
        """``plan`` for the adapters there are now. Raises as ``plan``."""
        if plan.is_bound:
            return self.plan(plan.budget_bytes, plan.context_tokens)
        return MemoryPlan.of(self.needs(plan.context_tokens), None, plan.chunk_tokens, None)

    @cached_property
    def speeds(self) -> Speeds:
        """Asked for once."""
        return self._measure()

    @cached_property
    def hit_rates(self) -> npt.NDArray[np.float64]:
        """Asked for once."""
        return self._make_hit_rates()
