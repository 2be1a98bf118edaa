"""Loading a model, from the hub if need be, with a bar; and the draft model beside it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cli.adapters import adapter_notes, fetch_adapters
from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.options import LoadOptions, SpeculationOptions
from mlx_mixtral.cli.progress import byte_progress, fetch
from mlx_mixtral.cli.several import own_group
from mlx_mixtral.errors import MemoryBudgetError, MixtralError, TokenizerError
from mlx_mixtral.generation.request import Speculation
from mlx_mixtral.runtime.speculation import DraftModel, PromptLookup
from mlx_mixtral.sizes import format_bytes, parse_size

__all__ = ["LoadedModel", "load_model", "load_with_speculation", "note_loaded"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and the seconds it took to load, downloading not counted."""

    model: Mixtral
    load_s: float


def load_model(
    source: str | Path,
    options: LoadOptions | None = None,
    *,
    chat_template: str | None = None,
    is_grouped: bool = True,
) -> LoadedModel:
    """``mlx_mixtral.load``, with bars on stderr when that is a terminal, and what is to be said of tokenizer and adapters.

    Of several adapters the first is in use.
    Where this process is the first machine of a group, all of them load it together, unless ``is_grouped`` is False.
    """
    options = options or LoadOptions()
    _ = options.overrides.checked  # before anything is downloaded
    folder = fetch(str(source), revision=options.revision)
    options = replace(options, adapters=fetch_adapters(options.adapters))
    started = time.perf_counter()
    with byte_progress("loading") as show:
        model = load(
            folder,
            progress=lambda at: show(at.done_bytes, at.total_bytes),
            chat_template=chat_template,
            group=own_group() if is_grouped else None,
            **options.arguments(),
        )
    if options.adapters:
        model.adapters.use(options.adapters[0].label)
    load_s = time.perf_counter() - started
    if model.engine.link is not None and (context := click.get_current_context(silent=True)) is not None:
        # The other machines wait for what is asked next until they are told that nothing is.
        context.find_root().call_on_close(lambda: _close(model))
    note_loaded(model)
    return LoadedModel(model, load_s)


def note_loaded(model: Mixtral) -> None:
    """Say on stderr what is to be said of a model's tokenizer and adapters."""
    with contextlib.suppress(TokenizerError):
        for message in model.tokenizer.notes:
            note(f"note: {one_line(message)}")
    for message in adapter_notes(model):
        note(f"note: {message}")


def _close(model: Mixtral) -> None:
    with contextlib.suppress(MixtralError):
        model.close()


def load_with_speculation(
    model: str, loading: LoadOptions, speculation: SpeculationOptions, *, chat_template: str | None = None
) -> tuple[LoadedModel, Speculation | None]:
    """``load_model``, and how to speculate with it.

    The draft is loaded first: without a budget the model then gets what the draft has left, with one the rest of it.
    Of a group the first machine alone has the draft; the others know nothing of it.

    Raises:
        MemoryBudgetError: the draft alone fills the budget.
        InvalidRequestError: the draft has another vocabulary.
    """
    if speculation.draft is None:
        loaded = load_model(model, loading, chat_template=chat_template)
        return loaded, PromptLookup() if speculation.speculate else None
    if speculation.speculate is not None:
        raise click.UsageError("give either --speculate or --draft")
    budget = None if loading.memory is None else parse_size(loading.memory)
    drafting = load_model(speculation.draft, LoadOptions(dtype=loading.dtype), is_grouped=False)
    if budget is not None:
        taken = drafting.model.engine.plan.resident_bytes
        if taken >= budget:
            raise MemoryBudgetError(
                f"a budget of {format_bytes(budget)} is too small: the draft model alone takes {format_bytes(taken)}; "
                "give more, or a smaller draft"
            )
        loading = replace(loading, memory=budget - taken)
    loaded = load_model(model, loading, chat_template=chat_template)
    drafter = DraftModel(drafting.model)
    drafter.check(loaded.model.engine, loaded.model.piece_of)
    return loaded, drafter
