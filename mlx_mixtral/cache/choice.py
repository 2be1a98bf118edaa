"""Whose adapter the rows of a forward are computed with."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

__all__ = ["AdapterChoice", "choice_of"]

AdapterChoice = int | tuple[tuple[int | None, int], ...] | None
"""The number of an adapter that all rows have, None where none has one; or runs of rows: an adapter and the count of its rows.

Keys and values are an adapter's as much as a prompt's, so it is a cache that knows whose it is, and its views that tell layers.
"""


def choice_of(rows: Iterable[int | None]) -> AdapterChoice:
    """The choice of rows with these adapters, in this order."""
    runs = tuple((adapter, len(list(run))) for adapter, run in groupby(rows))
    return runs if len(runs) > 1 else (runs[0][0] if runs else None)
