"""Which experts of a model at hand stay in memory under a budget: demands, measured speeds and hit rates brought together."""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.budget.demands import DEFAULT_CONTEXT_TOKENS, RESIDENT_CHUNK_TOKENS, MemoryNeeds, MemoryPlan
from mlx_mixtral.budget.slots import Speeds, plan_residency
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.experts.speeds import measure_speeds
from mlx_mixtral.experts.trace import RoutingTrace, hit_rates, published_trace
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.model.build import Builder
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.weights.dtypes import MLX_DTYPES

__all__ = ["TRACE_FILE", "Planner"]

TRACE_FILE = "routing.trace"
"""A routing trace of the model itself, beside its weights."""


class Planner:
    """Plans which experts of a model stay in memory, and changes that under a loaded one.

    Speeds are measured, and curves of hit rates made, when the first budget that cannot hold everything needs them.
    """

    def __init__(
        self, builder: Builder, device: Device, speeds: Speeds | None = None, *, kv: KVOptions | None = None
    ) -> None:
        self.builder, self.device, self.kv = builder, device, kv or KVOptions()
        # Says now what the model's heads do not allow.
        self.kv.storage(builder.config, MLX_DTYPES[builder.dtype])
        self.sizes = builder.sizes()
        self._given = speeds

    def demands(self, context: int | None) -> MemoryNeeds:
        """What the model needs beside experts, with ``context`` tokens of KV cache.

        Raises:
            InvalidRequestError, ContextLengthError: not a number of tokens the model can hold.
        """
        config = self.builder.config
        if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
            raise InvalidRequestError(f"context is {context!r}; it must be a number of tokens, at least 1")
        if context is not None and context > config.max_position_embeddings:
            raise ContextLengthError(
                f"context is {context}; the model's own is {config.max_position_embeddings} tokens"
            )
        tokens = context or min(config.max_position_embeddings, DEFAULT_CONTEXT_TOKENS)
        reading = 0 if config.is_dense else self.builder.store.reading_bytes
        keeps_scores = self.device.kind == "cpu"
        return MemoryNeeds(config, self.sizes, tokens, self.builder.item_bytes, keeps_scores, reading, self.kv)

    def plan(self, memory: str | int | None, context: int | None) -> MemoryPlan:
        """What stays in memory under a budget; None means what this machine can give.

        Raises:
            InvalidRequestError, ContextLengthError: sizes that are none.
            MemoryBudgetError: the budget is below the least the model can do with.
            CheckpointError: an expert cannot be read to see how fast the disk is.
        """
        demands = self.demands(context)
        budget = self._budget(memory)
        if budget is None or demands.resident_bytes <= budget:
            return MemoryPlan(demands, None if memory is None else budget, RESIDENT_CHUNK_TOKENS, None)
        chunk = demands.chunk_tokens(budget)
        room = demands.room_for_experts(budget, chunk)
        if self.builder.config.is_dense:
            return MemoryPlan(demands, budget, chunk, None)
        return MemoryPlan(demands, budget, chunk, plan_residency(self.sizes, room, self.speeds, self.hit_rates))

    @cached_property
    def speeds(self) -> Speeds:
        """As given, else measured on the checkpoint in a fraction of a second."""
        if self._given is not None:
            return self._given
        builder, kinds = self.builder, self.sizes.kinds
        layers = [layer for layer, kind in enumerate(kinds) if kind == kinds[0]]
        x = mx.ones((1, builder.config.hidden_size), MLX_DTYPES[builder.dtype])
        return measure_speeds(builder.store, builder.bank(0, 1), layers, x)

    @cached_property
    def hit_rates(self) -> npt.NDArray[np.float64]:
        """Of the model's own routing trace where it has one beside its weights, else of the published repeat rates."""
        config, own = self.builder.config, self.builder.checkpoint.folder / TRACE_FILE
        trace = RoutingTrace.load(own) if own.is_file() else None
        shape = (config.num_hidden_layers, config.num_experts_per_tok)
        if trace is None or (trace.experts.shape[1:], trace.num_experts) != (shape, config.num_local_experts):
            trace = published_trace(shape[0], config.num_local_experts, shape[1])
        return hit_rates(trace, self.builder.policy)

    def _budget(self, memory: str | int | None) -> int | None:
        if memory is not None:
            return parse_size(memory)
        return usable_bytes(self.device, read_system_memory())
