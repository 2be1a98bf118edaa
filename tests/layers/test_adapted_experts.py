"""Pairs of a call that adapters change: which of them, in which order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.cache.choice import AdapterChoice, choice_of
from mlx_mixtral.layers.adapted_experts import ExpertChanges, StackedChange, changes_of_pairs, changes_of_rows
from mlx_mixtral.layers.linear import StackedLinear

EXPERTS, RANK, IN, OUT = 4, 2, 8, 6


def _changes(seed: int) -> tuple[ExpertChanges, np.ndarray]:
    """Changes of "up" by one adapter, and the same as whole matrices ``[E, out, in]``."""
    chance = np.random.default_rng(seed)
    a, b = chance.standard_normal((EXPERTS, RANK, IN)), chance.standard_normal((EXPERTS, OUT, RANK))
    pair = (StackedLinear({"weight": mx.array(each.astype(np.float32))}, None) for each in (a, b))
    return ExpertChanges({"up": StackedChange(*pair)}), b @ a


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 0], [None, 1, 1], [1, None, 0], [2, 2, 0]])
def test_each_pair_is_changed_by_its_rows_adapter(rows: list[int | None], is_sorted: bool) -> None:
    """Some pairs of a call, in any order, against one product of whole matrices at a time; 2 changes nothing here."""
    chance = np.random.default_rng(3)
    made = {number: _changes(number) for number in (0, 1)}
    shape = (len(rows), 3, 2)  # [B, L, K]
    chosen = chance.integers(0, EXPERTS, 18)
    pairs = chance.permutation(18)[:13]
    x = chance.standard_normal((13, 1, IN)).astype(np.float32)
    found = changes_of_pairs(
        choice_of(rows),
        {number: changes for number, (changes, _) in made.items()},
        chosen[pairs],
        pairs,
        shape,
        is_sorted=is_sorted,
    )
    assert found is not None
    got = found.change("up", mx.array(x), OUT)
    expected = np.zeros((13, 1, OUT))
    for place, pair in enumerate(pairs):
        adapter = rows[pair // 6]
        if adapter in (0, 1):
            expected[place, 0] = made[adapter][1][chosen[pair]] @ x[place, 0]
    np.testing.assert_allclose(np.array(got), expected, atol=1e-5)
    assert found.change("down", mx.array(x), OUT) is None
    if is_sorted:
        # The promise that is made to MLX.
        assert all((np.diff(np.array(part.experts).astype(int)) >= 0).all() for part in found.parts)


@pytest.mark.parametrize("choice", [None, 5, ((None, 2), (5, 1))])
def test_nothing_is_computed_where_nothing_changes(choice: AdapterChoice) -> None:
    changes, _ = _changes(0)
    assert changes_of_rows(choice, {0: changes}, mx.zeros((3, 1, 2), mx.uint32)) is None
