"""Memory budgets by the share of the experts that stay in memory."""

from __future__ import annotations

from typing import Any


def budget_of(planner: Any, share: float, context: int | None = None) -> int:
    """Bytes with which ``share`` of a planner's experts stay in memory: 0 for the least possible, 1 for everything."""
    needs = planner.needs(context)
    if share >= 1:
        return int(needs.resident_bytes)
    return int(needs.min_bytes + share * sum(needs.sizes.expert_bytes) * needs.sizes.num_experts)
