"""Cuts of a model: whole groups and whole layers, everything once, nobody fuller than need be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.shares import Share, expert_shares, layer_shares
from mlx_mixtral.errors import InvalidRequestError
from tests.shared import SMALL

WEIGHTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=4)


def config(**changes: Any) -> MixtralConfig:
    return MixtralConfig.from_hf(SMALL | changes)


EIGHT_BY_SEVEN = config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)


def groups(shares: list[Share], size: int = 64) -> list[int]:
    return [len(share.columns) // size for share in shares if share.columns is not None]


def counts(shares: list[Share]) -> list[int]:
    return [len(share.layers) for share in shares]


def test_equal_machines_get_equal_parts_or_a_group_more_or_less() -> None:
    assert groups(expert_shares(EIGHT_BY_SEVEN, 64, [1, 1])) == [112, 112]
    assert groups(expert_shares(EIGHT_BY_SEVEN, 64, [1, 1, 1])) == [75, 75, 74]
    assert sorted(counts(layer_shares(EIGHT_BY_SEVEN, [1, 1, 1]))) == [10, 11, 11]


def test_machines_with_twice_the_memory_get_twice_as_much() -> None:
    assert groups(expert_shares(EIGHT_BY_SEVEN, 128, [128e9, 64e9, 32e9]), 128) == [64, 32, 16]
    assert counts(layer_shares(config(num_hidden_layers=56), [128, 64, 32])) == [32, 16, 8]


def test_the_leader_has_fewer_layers_for_its_embedding_and_head() -> None:
    assert counts(layer_shares(EIGHT_BY_SEVEN, [1, 1], layer_bytes=[10] * 32, leader_bytes=40)) == [14, 18]


def test_where_the_leader_is_the_fullest_the_others_are_even_all_the_same() -> None:
    assert counts(layer_shares(config(num_hidden_layers=9), [1, 1, 1], leader_bytes=7)) == [1, 4, 4]
    assert counts(layer_shares(config(num_hidden_layers=10), [1, 1, 2], leader_bytes=9)) == [1, 3, 6]


def test_layers_of_many_bits_count_for_more() -> None:
    assert counts(layer_shares(config(num_hidden_layers=6), [1, 1], layer_bytes=[30, 10, 10, 10, 10, 10])) == [2, 4]


def test_what_each_machine_holds() -> None:
    leader, other = expert_shares(EIGHT_BY_SEVEN, 64, [1, 1])
    assert (leader.is_leader, other.is_leader) == (True, False)
    assert all(share.holds(None) and share.holds(31) for share in (leader, other))
    assert [share.holds(None, is_head=True) for share in (leader, other)] == [True, False]
    first, last = layer_shares(EIGHT_BY_SEVEN, [1, 1])
    assert [share.holds(None) for share in (first, last)] == [True, False]
    assert [share.holds(16) for share in (first, last)] == [False, True]
    part = expert_shares(EIGHT_BY_SEVEN, 64, [1, 1, 1])[2].part_of(EIGHT_BY_SEVEN)
    assert (part.intermediate_size, part.num_hidden_layers) == (74 * 64, 32)


@settings(max_examples=100, deadline=None)
@given(st.integers(4, 40), st.integers(0, 31), st.sampled_from([32, 64, 128]), WEIGHTS)
def test_every_column_is_held_once_and_no_group_is_parted(
    whole: int, rest: int, group: int, weights: list[float]
) -> None:
    width = whole * group + rest
    shares = expert_shares(config(intermediate_size=width), group, weights)
    assert [column for share in shares for column in share.columns or ()] == list(range(width))
    assert all(share.columns and share.columns.start % group == 0 for share in shares)
    assert [(share.rank, share.size) for share in shares] == [(rank, len(weights)) for rank in range(len(weights))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=8), st.integers(0, 30), WEIGHTS)
def test_no_other_runs_of_layers_leave_the_fullest_machine_emptier(
    sizes: list[int], leader: int, weights: list[float]
) -> None:
    def fullest(ends: tuple[int, ...]) -> float:
        runs = list(itertools.pairwise(ends))
        return max(
            (sum(sizes[start:stop]) + leader * (rank == 0)) / weights[rank] for rank, (start, stop) in enumerate(runs)
        )

    layers = len(sizes)
    shares = layer_shares(config(num_hidden_layers=layers), weights, layer_bytes=sizes, leader_bytes=leader)
    ends = (0, *(share.layers.stop for share in shares))
    assert [layer for share in shares for layer in share.layers] == list(range(layers))
    assert all(share.layers for share in shares)
    others = ((0, *cut, layers) for cut in itertools.combinations(range(1, layers), len(weights) - 1))
    assert fullest(ends) <= min(map(fullest, others)) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda: expert_shares(config(intermediate_size=128), 64, [1] * 3), r"3 machines .* 128: it has 2 groups .*at most 2"),
        (lambda: layer_shares(config(), [1] * 3), r"3 machines cannot share 2 layers: .*at most 2"),
        (lambda: expert_shares(config(model_type="mistral", architectures=None), 64, [1, 1]), "dense mistral.*by 'layers'"),
        (lambda: layer_shares(config(), [1, 0]), "weight 0; it must be a number above 0"),
        (lambda: expert_shares(config(), 32, [1, float("nan")]), "weight nan"),
        (lambda: layer_shares(config(), []), "no machines"),
        (lambda: layer_shares(config(), [1], layer_bytes=[1]), "1 numbers; the model has 2 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_limit(cut: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        cut()
