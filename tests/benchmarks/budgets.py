"""Memory budgets by the share of the experts that stay in memory."""

from __future__ import annotations

from typing import Any


def budget_of(planner: Any, share: float, context: int | None = None) -> int:
    """Bytes with which ``share`` of a planner's experts stay in memory: 0 for the least possible, 1 for everything."""
    demands = planner.demands(context)
    if share >= 1:
        return int(demands.resident_bytes)
    return int(demands.min_bytes + share * sum(demands.sizes.expert_bytes) * demands.sizes.num_experts)
