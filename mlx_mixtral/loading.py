"""Building and filling a network from a checkpoint, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_mixtral.config import MixtralConfig
from mlx_mixtral.device import DTYPE_NAMES, current_device
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError, MemoryBudgetError
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.mixtral import MixtralModel
from mlx_mixtral.sizes import format_bytes, parse_size
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.fill import fill

__all__ = ["LoadProgress", "load_module"]

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class LoadProgress:
    """How far loading is, in bytes read from disk."""

    done_bytes: int
    total_bytes: int


def load_module(
    config: MixtralConfig,
    checkpoint: Checkpoint,
    dtype: str,
    memory: str | int | None,
    context: int | None,
    progress: Callable[[LoadProgress], None] | None,
) -> MixtralModel:
    builder = Builder(config, checkpoint, dtype)
    _refuse_cpu_gather(builder)
    _check_budget(config, builder, memory, context)
    module = builder.build()
    total = sum(item.nbytes for item in builder.fills)

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(LoadProgress(done_bytes, total))

    with CheckpointReader(checkpoint) as reader:
        fill(reader, builder.fills, report)
    return module


def _refuse_cpu_gather(builder: Builder) -> None:
    """MLX's CPU ``gather_mm`` computes float32 only: say so at load, not in the first forward."""
    plain = any(m.part == "expert" and builder.specs[path] is None for path, m in builder.matrices.items())
    if plain and not builder.config.is_dense and builder.dtype != "F32" and current_device().kind == "cpu":
        raise InvalidRequestError(
            f"unquantised experts cannot be computed in {DTYPE_NAMES[builder.dtype]} on MLX's CPU backend; "
            "use --dtype float32, or convert the checkpoint"
        )


def _check_budget(config: MixtralConfig, builder: Builder, memory: str | int | None, context: int | None) -> None:
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
        raise InvalidRequestError(f"context is {context!r}; it must be a number of tokens, at least 1")
    if context is not None and context > config.max_position_embeddings:
        raise ContextLengthError(f"context is {context}; the model's own is {config.max_position_embeddings} tokens")
    if memory is None:
        return
    budget = parse_size(memory)
    tokens = context or min(config.max_position_embeddings, DEFAULT_CONTEXT_TOKENS)
    kv_bytes = tokens * config.kv_bytes_per_token(builder.item_bytes)
    weight_bytes = builder.memory_bytes
    if weight_bytes + kv_bytes > budget:
        raise MemoryBudgetError(
            f"the model needs {format_bytes(weight_bytes + kv_bytes)}: {format_bytes(weight_bytes)} of weights and "
            f"{format_bytes(kv_bytes)} of KV cache for {tokens} tokens; the budget is {format_bytes(budget)}"
        )
