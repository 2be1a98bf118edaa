"""``info MODEL --memory SIZE``: what would stay in memory under a budget, and how fast that should be, before loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_mixtral.budget.demands import DEFAULT_CONTEXT_TOKENS, RESIDENT_CHUNK_TOKENS, MemoryNeeds, MemoryPlan
from mlx_mixtral.budget.slots import ModelSizes, ResidencyPlan, Speeds, plan_residency
from mlx_mixtral.cli.console import figures, out_console, print_table
from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.experts.trace import hit_rates, published_trace
from mlx_mixtral.info.estimate import BUILT_IN, WIDTHS, Width, bytes_by_part, expert_bytes
from mlx_mixtral.info.macs import Chip
from mlx_mixtral.sizes import format_bytes, parse_size

__all__ = ["folder_plan", "print_plans", "shape_plans"]

# A guess for shapes without a machine: synchronising once, as doctors of Apple GPUs measure it in the tenths of a millisecond.
READBACK_S = 200e-6
DEFAULT_DISK = "3GB"


def folder_plan(
    folder: Path, memory: str, context: int | None, chips: Sequence[Chip], disk: str | None, dtype: str
) -> dict[str, Any]:
    """The plan for a checkpoint on this machine; what is given of chip and disk replaces what is measured.

    Raises:
        MemoryBudgetError: the budget is below the least; CheckpointError, ConfigError: the folder cannot be loaded.
    """
    from mlx_mixtral.budget.planner import Planner
    from mlx_mixtral.config.mixtral import MixtralConfig
    from mlx_mixtral.machine.device import compute_dtype, current_device
    from mlx_mixtral.model.build import Builder
    from mlx_mixtral.weights.checkpoint import Checkpoint

    device = current_device()
    builder = Builder(MixtralConfig.from_folder(folder), Checkpoint(folder), compute_dtype(dtype, device))
    planner = Planner(builder, device)
    if not builder.config.is_dense:
        speeds = planner.speeds
        if len(chips) == 1:
            speeds = replace(speeds, memory_bytes_per_s=chips[0].bandwidth_gb_s * 1e9)
        if disk is not None:
            speeds = replace(speeds, disk_bytes_per_s=float(parse_size(disk)))
        planner = Planner(builder, device, speeds)
    planned = planner.plan(memory, context)
    return _report("this model", planned, None if builder.config.is_dense else planner.speeds)


def shape_plans(
    name: str, memory: str, context: int | None, chips: Sequence[Chip], disk: str | None
) -> list[dict[str, Any]]:
    """Plans for a published size at every bit width, on a chip by its published bandwidth.

    Raises:
        InvalidRequestError: no single chip is named, or a size is none.
    """
    if len(chips) != 1:
        raise InvalidRequestError("--memory with a published size needs one --chip, whose bandwidth is published")
    config, budget = BUILT_IN[name], parse_size(memory)
    tokens = min(context or DEFAULT_CONTEXT_TOKENS, config.max_position_embeddings)
    speeds = Speeds(float(parse_size(disk or DEFAULT_DISK)), chips[0].bandwidth_gb_s * 1e9, READBACK_S)
    layers = config.num_hidden_layers
    curves = hit_rates(published_trace(layers, config.num_local_experts, config.num_experts_per_tok))
    found = []
    for width in WIDTHS:
        one = expert_bytes(config, width)
        demands = MemoryNeeds(config, _sizes(name, width, one), tokens, 2, keeps_scores=False)
        try:
            if demands.resident_bytes <= budget:
                planned = MemoryPlan(demands, budget, RESIDENT_CHUNK_TOKENS, None)
            else:
                chunk = demands.chunk_tokens(budget)
                room = demands.room_for_experts(budget, chunk)
                planned = MemoryPlan(demands, budget, chunk, plan_residency(demands.sizes, room, speeds, curves))
        except MemoryBudgetError as error:
            found.append({"model": width.name, "problem": str(error), "min_bytes": demands.min_bytes})
            continue
        found.append(_report(width.name, planned, speeds))
    return found


def print_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """The plans as a table, the first one's rates above it."""
    rows = []
    for plan in plans:
        if plan.get("problem"):
            rows.append([plan["model"], f"needs {format_bytes(plan['min_bytes'])}", *[""] * 6])
            continue
        streamed = plan["streamed_layers"]
        rows.append(
            [
                plan["model"],
                *_slots(plan),
                format_bytes(plan["resident_bytes"]),
                format_bytes(plan["kv_bytes"] + plan["working_bytes"]),
                "" if not streamed else f"{plan['hit_rate']:.0%}",
                "" if not streamed else format_bytes(plan["bytes_read_per_token"]),
                figures(plan["predicted_tok_s"]) if plan["predicted_tok_s"] else "",
            ]
        )
    print_table(
        "Under this budget",
        ["", "resident", "slots", "weights", "other", "hits", "read/token", "tok/s"],
        rows,
        left=3,
    )
    speeds = next((plan["speeds"] for plan in plans if plan.get("speeds")), None)
    if speeds is not None:
        out_console().print(
            "Resident: layers with all experts in memory; slots: of the others. Other: KV cache and working memory.\n"
            f"Predicted for {format_bytes(speeds['disk_bytes_per_s'])}/s of disk, "
            f"{format_bytes(speeds['memory_bytes_per_s'])}/s through the weights and "
            f"{speeds['readback_s'] * 1e6:.0f} µs for reading a router's choice back.\n",
            style="dim",
            soft_wrap=True,
        )


def _sizes(name: str, width: Width, one: int) -> ModelSizes:
    config, parts = BUILT_IN[name], bytes_by_part(BUILT_IN[name], width)
    layers = config.num_hidden_layers
    trunk = sum(parts.values()) - parts["expert"]
    kinds = (0,) * layers
    return ModelSizes(
        trunk, (one,) * layers, (one,) * layers, kinds, config.num_local_experts, config.num_experts_per_tok
    )


def _report(name: str, planned: MemoryPlan, speeds: Speeds | None) -> dict[str, Any]:
    sizes, plan = planned.demands.sizes, planned.residency
    layers = len(sizes.expert_bytes)
    slots = [sizes.num_experts] * layers if plan is None else list(plan.slots)
    experts = plan.expert_bytes if plan is not None else sizes.num_experts * sum(sizes.expert_bytes)
    return {
        "model": name,
        "budget_bytes": planned.budget_bytes,
        "resident_bytes": sizes.trunk_bytes + experts,
        "kv_bytes": planned.demands.kv_bytes,
        "context": planned.demands.context,
        "working_bytes": planned.working_bytes,
        "chunk_tokens": planned.chunk_tokens,
        "min_bytes": planned.demands.min_bytes,
        "slots": slots,
        "num_experts": sizes.num_experts,
        "streamed_layers": sum(count < sizes.num_experts for count in slots),
        **_predictions(sizes, plan, speeds),
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


def _slots(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Layers with all their experts in memory, and the slots of the others."""
    slots, experts = plan["slots"], plan["num_experts"]
    if not slots:
        return "all", ""
    others = sorted({count for count in slots if count < experts})
    whole = f"{sum(count == experts for count in slots)} of {len(slots)}"
    if not others:
        return whole, ""
    span = f"{others[0]}" if len(others) == 1 else f"{others[0]}-{others[-1]}"
    return whole, span
