"""How many generations a batch has at once where nobody says."""

from __future__ import annotations

from mlx_mixtral.arguments import check_integer, is_number, shown
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.speculation.cost import ForwardCost

__all__ = ["MAX_ROWS", "MAX_STEP_S", "check_limits", "default_rows"]

MAX_ROWS = 8
MAX_STEP_S = 0.5


def check_limits(max_rows: int | None, max_stall_s: float) -> None:
    """Raise InvalidRequestError for what is no number of rows, None aside, or of seconds."""
    if max_rows is not None:
        check_integer("max_rows", max_rows, 1)
    if not is_number(max_stall_s) or not max_stall_s > 0:
        raise InvalidRequestError(f"max_stall_s is {shown(max_stall_s)}; it must be a number of seconds above 0")


def default_rows(plan: MemoryPlan, cost: ForwardCost, max_step_s: float = MAX_STEP_S) -> int:
    """``MAX_ROWS``, or where experts are streamed as many as the plan's speeds give a step of at most ``max_step_s``.

    More rows choose more experts: of 8x7B's eight, B rows touch 8 (1 - 0.75^B) a layer, which is 2, 3.5, 5.5 and 7.2 for 1, 2,
    4 and 8, and those that are not in memory are read. One row there is in any case.
    """
    if plan.residency is None:
        return MAX_ROWS
    rows = 1
    while rows < MAX_ROWS and cost.seconds(rows + 1) <= max_step_s:
        rows += 1
    return rows
