"""What would stay in memory under a budget, and how fast that should be, before anything is loaded: as ``load`` plans it.

Plans are JSON documents, as ``info --memory SIZE --json`` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.budget.slots import ModelSizes, ResidencyPlan, Speeds
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides
from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.experts.trace import hit_rates, published_trace
from mlx_mixtral.info.estimate import BUILT_IN, WIDTHS, bytes_by_part
from mlx_mixtral.info.macs import CHIPS, Chip
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import compute_dtype, current_device
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.planning import make_planner
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.weights.checkpoint import Checkpoint

__all__ = [
    "DEFAULT_DISK",
    "READBACK_S",
    "checkpoint_plan",
    "mac_planner",
    "one_chip",
    "plan_of",
    "shape_plans",
    "sizes_of",
]

# A guess for shapes without a machine: one synchronisation takes tenths of a millisecond on Apple GPUs.
READBACK_S = 200e-6
DEFAULT_DISK = "3GB"


def checkpoint_plan(
    folder: Path,
    memory: str,
    context: int | None,
    chips: Sequence[Chip],
    disk: str | None,
    overrides: ConfigOverrides | None = None,
) -> dict[str, Any]:
    """The plan for a checkpoint on this machine; what is given of chip and disk replaces what is measured.

    Raises:
        MemoryBudgetError: the budget is below the least; CheckpointError, ConfigError: the folder cannot be loaded.
    """
    device = current_device()
    config = (overrides or ConfigOverrides()).apply(MixtralConfig.from_folder(folder), context)
    dtype = compute_dtype("auto", device)
    builder = Builder(config, Checkpoint(folder), dtype, products=products_for(device))
    planner = make_planner(builder, device)
    if builder.config.is_dense:
        return _report("this model", planner.plan(memory, context), planner.sizes, None)
    speeds = planner.speeds
    if len(chips) == 1:
        speeds = replace(speeds, memory_bytes_per_s=chips[0].bandwidth_gb_s * 1e9)
    if disk is not None:
        speeds = replace(speeds, disk_bytes_per_s=float(parse_size(disk)))
    plan = make_planner(builder, device, speeds=speeds).plan(memory, context)
    return _report("this model", plan, planner.sizes, speeds)


def shape_plans(
    name: str,
    memory: str,
    context: int | None,
    chips: Sequence[Chip],
    disk: str | None,
    overrides: ConfigOverrides | None = None,
) -> list[dict[str, Any]]:
    """Plans for a published size at every bit width, on a chip by its published bandwidth.

    Raises:
        InvalidRequestError: no single chip is named, or a size is none.
    """
    chip = one_chip(chips, "a plan for --memory")
    config = (overrides or ConfigOverrides()).apply(BUILT_IN[name], context)
    speeds = Speeds(float(parse_size(disk or DEFAULT_DISK)), chip.bandwidth_gb_s * 1e9, READBACK_S)
    return [plan_of(width.name, config, bytes_by_part(config, width), memory, context, speeds) for width in WIDTHS]


def plan_of(
    name: str, config: MixtralConfig, parts: Mapping[str, int], memory: str, context: int | None, speeds: Speeds
) -> dict[str, Any]:
    """The plan of a model with parts of these bytes for a Mac elsewhere; ``problem`` where the budget is too small."""
    planner = mac_planner(config, sizes_of(config, sum(parts.values()) - parts["expert"], parts["expert"]), speeds)
    try:
        return _report(name, planner.plan(memory, context), planner.sizes, speeds)
    except MemoryBudgetError as error:
        return {"model": name, "problem": str(error), "min_bytes": planner.needs(context).min_bytes}


def one_chip(chips: Sequence[Chip], what: str) -> Chip:
    """The chip a plan is made for.

    Raises:
        InvalidRequestError: there are several; the message says ``what`` needs one, and how to name it.
    """
    if len(chips) == 1:
        return chips[0]
    fix = (
        "name one with --chip to use its published bandwidth"
        if chips == CHIPS
        else f"name {_one_of(chips)} with --chip"
    )
    raise InvalidRequestError(f"{what} is made for one chip; {fix}")


def mac_planner(config: MixtralConfig, sizes: ModelSizes, speeds: Speeds) -> Planner:
    """A planner for a Mac that is not here: 16-bit numbers, kernels of its GPU, routing as it was published."""
    return Planner(
        config,
        sizes,
        item_bytes=2,
        reading_bytes=0,
        keeps_scores=False,
        kv=KVOptions(),
        available_bytes=lambda: None,
        speeds=lambda: speeds,
        hit_rates=lambda: _published_hit_rates(
            config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok
        ),
    )


@cache
def _published_hit_rates(num_layers: int, num_experts: int, per_token: int) -> npt.NDArray[np.float64]:
    return hit_rates(published_trace(num_layers, num_experts, per_token))


def sizes_of(config: MixtralConfig, trunk_bytes: int, expert_bytes: int) -> ModelSizes:
    """Of a model whose experts have ``expert_bytes`` together, in layers that are all alike; a dense model is all trunk."""
    if config.is_dense:
        trunk_bytes, expert_bytes = trunk_bytes + expert_bytes, 0
    layers, count = config.num_hidden_layers, config.num_local_experts
    experts = (expert_bytes // (layers * count),) * layers
    return ModelSizes(trunk_bytes, experts, experts, (0,) * layers, count, config.num_experts_per_tok)


def _report(name: str, plan: MemoryPlan, sizes: ModelSizes, speeds: Speeds | None) -> dict[str, Any]:
    residency = plan.residency
    slots = [sizes.num_experts] * len(sizes.expert_bytes) if residency is None else list(residency.slots)
    experts = sizes.all_expert_bytes if residency is None else residency.expert_bytes
    return {
        "model": name,
        "budget_bytes": plan.budget_bytes,
        "resident_bytes": sizes.trunk_bytes + experts,
        "kv_bytes": plan.kv_bytes,
        "context": plan.context_tokens,
        "working_bytes": plan.working_bytes,
        "chunk_tokens": plan.chunk_tokens,
        "min_bytes": plan.min_bytes,
        "slots": slots,
        "num_experts": sizes.num_experts,
        "streamed_layers": sum(count < sizes.num_experts for count in slots),
        **_predictions(sizes, residency, speeds),
        "speeds": None if speeds is None else vars(speeds),
    }


def _predictions(sizes: ModelSizes, plan: ResidencyPlan | None, speeds: Speeds | None) -> dict[str, Any]:
    if plan is None:
        chosen = sizes.num_experts_per_tok * sum(sizes.expert_bytes)
        tok_s = None if speeds is None else speeds.memory_bytes_per_s / (sizes.trunk_bytes + chosen)
        return {"predicted_tok_s": tok_s, "bytes_read_per_token": 0, "hit_rate": 1.0, "readbacks_per_token": 0}
    needed = sizes.num_experts_per_tok * plan.readbacks_per_token
    return {
        "predicted_tok_s": plan.tok_s,
        "bytes_read_per_token": plan.bytes_per_token,
        "hit_rate": 1 - plan.misses_per_token / needed if needed else 1.0,
        "readbacks_per_token": plan.readbacks_per_token,
    }


def _one_of(chips: Sequence[Chip]) -> str:
    return " or ".join(f"'{chip.name}' ({chip.bandwidth_gb_s:g} GB/s)" for chip in chips)
