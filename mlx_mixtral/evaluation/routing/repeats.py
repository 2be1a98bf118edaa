"""Table 5 of "Mixtral of Experts" (arXiv 2401.04088) for a model at hand: repeats beside the paper's, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_mixtral.evaluation.routing.analysis import ALL, Estimate, RoutingAnalysis
from mlx_mixtral.evaluation.routing.published import PUBLISHED_LAYERS, PUBLISHED_MODEL, mean_published, published_for

__all__ = ["RepeatTable", "repeat_tables", "with_percent"]


class RepeatTable(NamedTuple):
    """One table; rows are as long as ``columns``, the domain first."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def repeat_tables(found: RoutingAnalysis, layers: Sequence[int], *, with_details: bool = True) -> list[RepeatTable]:
    """One table for the first choice, one for all choices; the paper's figures on the right where experts are as many.

    Args:
        with_details: with the number of tokens and standard errors.
    """
    kinds = [("first choice", "first", found.chance_first, found.chance_first == 1 / 8)]
    if found.per_token > 1:
        words = "first or second choice" if found.per_token == 2 else f"any of {found.per_token} choices"
        kinds.append((words, "either", found.chance_either, (found.num_experts, found.per_token) == (8, 2)))
    tables = []
    for words, kind, chance, comparable in kinds:
        columns = ["domain", *(["tokens"] if with_details else []), *(f"layer {layer}" for layer in layers)]
        if comparable:
            columns += [PUBLISHED_MODEL, *(f"{layer}" for layer in PUBLISHED_LAYERS)]
        rows = []
        for name, domain in found.rows.items():
            estimate = domain.repeats_first if kind == "first" else domain.repeats_either
            row = [name, *([f"{domain.tokens:,}"] if with_details else [])]
            row += [with_percent(estimate, (layer,), with_error=with_details) for layer in layers]
            if comparable:
                other = mean_published() if name == ALL and len(found.domains) > 1 else published_for(name)
                figures = () if other is None else (other.first if kind == "first" else other.either)
                row += ["", "", "", ""] if other is None else [other.domain, *(f"{f:.1%}" for f in figures)]
            rows.append(row)
        random = [f"{chance:.1%}" for _ in layers]
        rows.append(["random", *([""] if with_details else []), *random, *([""] * 4 if comparable else [])])
        tables.append(RepeatTable(f"Repeated from token to token, {words} (the paper's table 5)", columns, rows))
    return tables


def with_percent(estimate: Estimate, place: tuple[int, ...], *, with_error: bool = True) -> str:
    """``14.9% ± 0.3``, of one of the estimate's shares."""
    value, error = estimate.value[place], estimate.stderr[place]
    if not np.isfinite(value):
        return "–"
    return f"{value:.1%} ± {100 * error:.1f}" if with_error and np.isfinite(error) else f"{value:.1%}"
