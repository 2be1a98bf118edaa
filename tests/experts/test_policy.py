"""Replacement policies by hand-made sequences, and the optimal one against an exhaustive search."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.policy import LFU, LRU, POLICIES, Optimal, make_policy
from mlx_mixtral.experts.trace import simulate


def test_lru_gives_up_what_was_not_used_for_longest() -> None:
    policy = LRU()
    for key in (1, 2, 3, 1):
        policy.touch(key)
    assert policy.victim([1, 2, 3]) == 2
    assert policy.victim({1, 3}) == 3
    policy.forget(2)
    policy.touch(2)
    assert policy.victim([1, 2, 3]) == 3


def test_lru_gives_up_keys_it_was_never_told_of_first() -> None:
    policy = LRU()
    policy.touch((0, 1))
    assert policy.victim([(0, 1), (5, 5)]) == (5, 5)


def test_lfu_prefers_favourites_to_recent_ones() -> None:
    policy = LFU()
    for key in (1, 1, 1, 2, 3):
        policy.touch(key)
    assert policy.victim([1, 2, 3]) == 2
    assert policy.victim([1, 3]) == 3


def test_lfu_remembers_how_often_it_needed_what_it_gave_up() -> None:
    policy = LFU()
    for key in (1, 1, 2):
        policy.touch(key)
    policy.forget(1)
    policy.touch(3)
    assert policy.victim([1, 3]) == 3


def test_lfu_adapts_when_favourites_change() -> None:
    slow, quick = LFU(half_life=1e9), LFU(half_life=4)
    for policy in (slow, quick):
        for key in (*[1] * 20, *[2] * 12):
            policy.touch(key)
    assert slow.victim([1, 2]) == 2
    assert quick.victim([1, 2]) == 1


def test_lfu_refuses_a_half_life_that_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="half_life is 0"):
        LFU(half_life=0)


def test_optimal_gives_up_what_is_needed_last() -> None:
    policy = Optimal([1, 2, 3, 1, 3, 2])
    for key in (1, 2, 3):
        policy.touch(key)
    assert policy.victim([1, 2, 3]) == 2
    for key in (1, 3):
        policy.touch(key)
    assert policy.victim([1, 2]) == 1  # never needed again


def test_policies_are_made_by_name() -> None:
    assert {name: type(make_policy(name)) for name in POLICIES} == {"lru": LRU, "lfu": LFU}
    with pytest.raises(InvalidRequestError, match="'fifo' is unknown; use one of lru, lfu"):
        make_policy("fifo")


def fewest_misses(tokens: list[list[int]], slots: int) -> int:
    """Over all sequences of what to hold, by trying them."""

    @cache
    def after(at: int, held: frozenset[int]) -> int:
        if at == len(tokens):
            return 0
        needed = frozenset(tokens[at])
        rest = sorted(held - needed)
        room = slots - len(needed)
        keeps = [frozenset(kept) for kept in combinations(rest, min(room, len(rest)))]
        return len(needed - held) + min(after(at + 1, needed | kept) for kept in keeps)

    return after(0, frozenset())


@settings(deadline=None)
@given(st.data(), st.integers(2, 5), st.integers(1, 2))
def test_optimal_misses_as_little_as_anything_can(data: st.DataObject, num_experts: int, per_token: int) -> None:
    slots = data.draw(st.integers(per_token, num_experts))
    token = st.lists(st.integers(0, num_experts - 1), min_size=per_token, max_size=per_token, unique=True)
    tokens = data.draw(st.lists(token, min_size=1, max_size=10))
    choices = np.array(tokens, np.uint16)
    best = simulate(choices, num_experts, slots, "optimal").misses
    assert best == fewest_misses(tokens, slots)
    assert all(simulate(choices, num_experts, slots, name).misses >= best for name in POLICIES)
