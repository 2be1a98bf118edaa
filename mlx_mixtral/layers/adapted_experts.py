"""What adapters change of a layer's experts: low-rank products of token-expert pairs, gathered by expert, never by slot.

Slots tell where an expert's weights lie at the moment; changes are small, and lie in memory whatever the budget is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.layers.linear import StackedLinear

__all__ = ["ExpertChanges", "PairChanges", "StackedChange", "changes_of_pairs", "changes_of_rows", "changes_of_sorted"]

Projection = Literal["gate", "up", "down"]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StackedChange:
    """``B_e (A_e x) + bias_e`` of the experts of a layer: ``A [E, r, in]``, ``B [E, out, r]``, ``bias [E, 1, out]`` or none."""

    a: StackedLinear
    b: StackedLinear
    bias: mx.array | None = None

    @property
    def arrays(self) -> Iterator[mx.array]:
        """All arrays held."""
        held = (self.a.weight, self.b.weight, self.bias)
        return (array for array in held if array is not None)

    def __call__(self, x: mx.array, experts: mx.array, *, is_sorted: bool) -> mx.array:
        """Of the pairs ``experts [...]``, for ``x [..., 1, in]``: ``[..., 1, out]``."""
        y = self.b(self.a(x, experts, is_sorted=is_sorted), experts, is_sorted=is_sorted)
        return y if self.bias is None else y + self.bias[experts]


@dataclass(frozen=True)
class ExpertChanges:
    """Of all experts of a layer by one adapter: of each part that it changes."""

    parts: Mapping[Projection, StackedChange]

    @property
    def arrays(self) -> Iterator[mx.array]:
        """All arrays held."""
        return (array for change in self.parts.values() for array in change.arrays)

    def change(self, part: Projection, x: mx.array, experts: mx.array, *, is_sorted: bool) -> mx.array | None:
        """What is added to a part's product of ``x [..., 1, in]``; None for no change."""
        found = self.parts.get(part)
        return None if found is None else found(x, experts, is_sorted=is_sorted)


@dataclass(frozen=True)
class _Rows:
    """Rows of a call that one adapter changes; ``at`` says where they are, ``experts`` whom they meet."""

    at: slice | mx.array
    own: ExpertChanges | None
    experts: mx.array


@dataclass(frozen=True)
class PairChanges:
    """What adapters change of the pairs of one call, as they lie there.

    ``parts`` are runs of them; ``back`` brings their results into the order of the call, where they are not in it.
    """

    parts: Sequence[_Rows]
    back: mx.array | None
    is_sorted: bool

    def change(self, part: Projection, x: mx.array, width: int) -> mx.array | None:
        """What is added to a part's product ``[..., width]`` of ``x [..., 1, in]``; None where nothing is."""
        found = [
            None if rows.own is None else rows.own.change(part, x[rows.at], rows.experts, is_sorted=self.is_sorted)
            for rows in self.parts
        ]
        if all(each is None for each in found):
            return None
        if len(found) == 1 and self.back is None:
            return found[0]
        kind = next(each.dtype for each in found if each is not None)
        whole = mx.concatenate(
            [
                mx.zeros((*rows.experts.shape, 1, width), kind) if each is None else each
                for rows, each in zip(self.parts, found, strict=True)
            ]
        )
        return whole if self.back is None else whole[self.back]


def changes_of_rows(
    choice: AdapterChoice, changes: Mapping[int, ExpertChanges], experts: mx.array, *, is_sorted: bool = False
) -> PairChanges | None:
    """Of a call whose rows lie as the choice has them: ``experts [B, L, K]``, or where one adapter has all of them ``[P]``."""
    if choice is None or not changes:
        return None
    if isinstance(choice, int):
        own = changes.get(choice)
        return None if own is None else PairChanges([_Rows(slice(None), own, experts)], None, is_sorted)
    parts, start = [], 0
    for adapter, count in choice:
        rows = slice(start, start + count)
        start += count
        parts.append(_Rows(rows, None if adapter is None else changes.get(adapter), experts[rows]))
    return PairChanges(parts, None, is_sorted) if any(part.own is not None for part in parts) else None


def changes_of_sorted(
    choice: AdapterChoice,
    changes: Mapping[int, ExpertChanges],
    experts: mx.array,
    order: mx.array,
    back: mx.array,
) -> PairChanges | None:
    """Of a call whose pairs were sorted by expert: ``experts [B, L, K]`` as they were, ``order`` and ``back`` ``[P]``."""
    flat = experts.reshape(-1)
    if choice is None or isinstance(choice, int):
        return changes_of_rows(choice, changes, flat[order], is_sorted=True)
    a_row, start, parts = prod(experts.shape[1:]), 0, []
    for adapter, count in choice:
        run = slice(start, start + count * a_row)
        start = run.stop
        own = None if adapter is None else changes.get(adapter)
        parts.append(_Rows(back[run], own, flat[run]))
    return PairChanges(parts, order, is_sorted=False) if any(part.own is not None for part in parts) else None


def changes_of_pairs(
    choice: AdapterChoice,
    changes: Mapping[int, ExpertChanges],
    experts: Integers,
    pairs: Integers,
    shape: tuple[int, ...],
    *,
    is_sorted: bool,
) -> PairChanges | None:
    """Of some of a call's pairs, known to the host.

    Args:
        experts: ``[P]``, of each pair.
        pairs: ``[P]``, numbers of the pairs among those ``shape`` ``[B, L, K]`` of the call.
        is_sorted: whether products are of sorted experts; these need not be.
    """
    if choice is None or not changes:
        return None
    runs = ((choice, shape[0]),) if isinstance(choice, int) else choice
    row_of, start, parts, order = pairs // prod(shape[1:]), 0, [], []
    for adapter, count in runs:
        at = np.flatnonzero((row_of >= start) & (row_of < start + count))
        start += count
        if not len(at):
            continue
        if is_sorted:
            at = at[np.argsort(experts[at], kind="stable")]
        order.append(at)
        own = None if adapter is None else changes.get(adapter)
        parts.append(_Rows(mx.array(at), own, mx.array(experts[at].astype(np.uint32))))
    if all(part.own is None for part in parts):
        return None
    whole = np.concatenate(order)
    if len(parts) == 1 and (whole == np.arange(len(whole))).all():
        only = parts[0]
        return PairChanges([_Rows(slice(None), only.own, only.experts)], None, is_sorted)
    return PairChanges(parts, mx.array(np.argsort(whole)), is_sorted)
