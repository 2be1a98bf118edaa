"""``--speculate`` and ``--draft``: what they become, and a draft's share of the memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_mixtral.cli.options import F

if TYPE_CHECKING:
    from mlx_mixtral.cli.progress import LoadedModel
    from mlx_mixtral.generation.request import Speculation

__all__ = ["load_with_speculation", "speculation_options"]


def speculation_options(command: F) -> F:
    """``--speculate lookup`` and ``--draft MODEL``."""
    for option in (
        click.option(
            "--draft",
            metavar="MODEL",
            help="Verify what this smaller model with the same vocabulary writes ahead; its memory is part of --memory.",
        ),
        click.option(
            "--speculate",
            type=click.Choice(("lookup",)),
            help="Verify several tokens at once, where the text repeats what was said before; same text, sooner.",
        ),
    ):
        command = option(command)
    return command


def load_with_speculation(
    model: str, *, speculate: str | None, draft: str | None, **options: Any
) -> tuple[LoadedModel, Speculation | None]:
    """``load_model``, and how to speculate with it.

    The draft is loaded first: without a budget the model then gets what the draft has left, with one the rest of it.

    Raises:
        MemoryBudgetError: the draft alone fills the budget.
        InvalidRequestError: the draft has another vocabulary.
    """
    from mlx_mixtral.cli.progress import load_model

    if draft is not None and speculate is not None:
        raise click.UsageError("give either --speculate or --draft")
    if draft is None:
        from mlx_mixtral.runtime.speculation import PromptLookup

        return load_model(model, **options), PromptLookup() if speculate else None

    from mlx_mixtral.errors import MemoryBudgetError
    from mlx_mixtral.runtime.speculation import DraftModel
    from mlx_mixtral.sizes import format_bytes, parse_size

    budget = None if options.get("memory") is None else parse_size(options["memory"])
    drafting = load_model(draft, dtype=options.get("dtype", "auto"))
    if budget is not None:
        taken = drafting.model.engine.plan.resident_bytes
        if taken >= budget:
            raise MemoryBudgetError(
                f"a budget of {format_bytes(budget)} is too small: the draft model alone takes {format_bytes(taken)}; "
                "give more, or a smaller draft"
            )
        options["memory"] = budget - taken
    loaded = load_model(model, **options)
    speculation = DraftModel(drafting.model)
    speculation.check(loaded.model.engine, loaded.model.piece_of)
    return loaded, speculation
