"""Loading a model, from the hub if need be, with a bar; and the draft model beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import click

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cli.options import LoadOptions, SpeculationOptions
from mlx_mixtral.cli.progress import byte_progress, fetch
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.generation.request import Speculation
from mlx_mixtral.runtime.speculation import DraftModel, PromptLookup
from mlx_mixtral.sizes import format_bytes, parse_size

__all__ = ["LoadedModel", "load_model", "load_with_speculation"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and the seconds it took to load, downloading not counted."""

    model: Mixtral
    load_s: float


def load_model(source: str | Path, options: LoadOptions | None = None) -> LoadedModel:
    """``mlx_mixtral.load``, with bars on stderr when that is a terminal."""
    options = options or LoadOptions()
    _ = options.overrides.checked  # before anything is downloaded
    folder = fetch(str(source), revision=options.revision)
    started = time.perf_counter()
    with byte_progress("loading") as show:
        model = load(folder, progress=lambda at: show(at.done_bytes, at.total_bytes), **options.arguments())
    return LoadedModel(model, time.perf_counter() - started)


def load_with_speculation(
    model: str, loading: LoadOptions, speculation: SpeculationOptions
) -> tuple[LoadedModel, Speculation | None]:
    """``load_model``, and how to speculate with it.

    The draft is loaded first: without a budget the model then gets what the draft has left, with one the rest of it.

    Raises:
        MemoryBudgetError: the draft alone fills the budget.
        InvalidRequestError: the draft has another vocabulary.
    """
    if speculation.draft is None:
        return load_model(model, loading), PromptLookup() if speculation.speculate else None
    if speculation.speculate is not None:
        raise click.UsageError("give either --speculate or --draft")
    budget = None if loading.memory is None else parse_size(loading.memory)
    drafting = load_model(speculation.draft, LoadOptions(dtype=loading.dtype))
    if budget is not None:
        taken = drafting.model.engine.plan.resident_bytes
        if taken >= budget:
            raise MemoryBudgetError(
                f"a budget of {format_bytes(budget)} is too small: the draft model alone takes {format_bytes(taken)}; "
                "give more, or a smaller draft"
            )
        loading = replace(loading, memory=budget - taken)
    loaded = load_model(model, loading)
    drafter = DraftModel(drafting.model)
    drafter.check(loaded.model.engine, loaded.model.piece_of)
    return loaded, drafter
