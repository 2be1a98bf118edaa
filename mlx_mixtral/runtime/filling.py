"""The weights of a model, or of one machine's share of it: planned, allocated and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.machine.device import DTYPE_NAMES, Device
from mlx_mixtral.model.adapting import Adapting
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.planning import make_planner
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.weights.checkpoint import CheckpointReader
from mlx_mixtral.weights.fill import fill

__all__ = ["LoadProgress", "LoadedWeights", "load_module", "load_whole", "refuse_cpu_gather", "room_for"]


@dataclass(frozen=True)
class LoadProgress:
    """How far loading is, in bytes read from disk.

    Example:
        >>> load("mixtral-4bit", progress=lambda at: print(f"{at.done_bytes / at.total_bytes:.0%}"))
    """

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LoadedWeights:
    """A model whose weights were read, and what plans and allocates for it."""

    builder: Builder
    planner: Planner
    module: MixtralModel
    residency: Residency


def load_module(
    builder: Builder, plan: MemoryPlan, progress: Callable[[LoadProgress], None] | None
) -> tuple[MixtralModel, Residency]:
    """Allocate the model and read what stays in memory.

    Raises:
        CheckpointError: weights that cannot be read or held.
    """
    module = builder.build(plan.slots, plan.overflow_slots)
    total = sum(item.nbytes for item in builder.ranges)

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(LoadProgress(done_bytes, total))

    with CheckpointReader(builder.checkpoint) as reader:
        fill(reader, builder.ranges, report)
    builder.ranges.clear()
    residency = Residency(builder.store, builder.sizes(), module.gathered, builder.overflow, plan, builder.policy)
    builder.overflow = {}
    return module, residency


def refuse_cpu_gather(builder: Builder, device: Device) -> None:
    """MLX's CPU ``gather_mm`` computes float32 only: say so at load, not in the first forward."""
    plain = any(m.part == "expert" and builder.specs[path] is None for path, m in builder.matrices.items())
    if plain and not builder.config.is_dense and builder.dtype != "F32" and device.kind == "cpu":
        raise InvalidRequestError(
            f"unquantised experts cannot be computed in {DTYPE_NAMES[builder.dtype]} on MLX's CPU backend; "
            "use --dtype float32, or convert the checkpoint"
        )


def room_for(builder: Builder, adapters: Sequence[Adapter], device: Device) -> int:
    """Bytes that adapters will take.

    Raises:
        InvalidRequestError: the model cannot run with one of them.
    """
    adapting = Adapting(builder)
    for adapter in adapters:
        adapting.check(adapter, on_cpu=device.kind == "cpu")
    return sum(map(adapting.nbytes, adapters))


def load_whole(
    build: Callable[[], Builder],
    place: Device,
    kv: KVOptions,
    memory: str | float | None,
    context: int | None,
    progress: Callable[[LoadProgress], None] | None,
    adapters: Sequence[Adapter] = (),
) -> LoadedWeights:
    """All of a model, as ``load`` has the arguments, with room for ``adapters``.

    Raises:
        MixtralError: as ``load``.
    """
    builder = build()
    refuse_cpu_gather(builder, place)
    planner = make_planner(builder, place, kv=kv)
    planner.adapter_bytes = room_for(builder, adapters, place)
    module, residency = load_module(builder, planner.plan(memory, context), progress)
    return LoadedWeights(builder, planner, module, residency)
