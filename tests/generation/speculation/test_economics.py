"""When speculation pays: the cost model against counting, and decisions against what a round brings on average."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mlx_mixtral.budget.slots import ModelSizes, Speeds
from mlx_mixtral.generation.speculation.cost import ForwardCost, distinct_experts
from mlx_mixtral.generation.speculation.economics import RETRY_TOKENS, Acceptance, Economics, expected_tokens

# 8x7B in 16 bits: 32 layers, 176M numbers per expert, 1.6G of everything else.
MIXTRAL = ModelSizes(3_210_000_000, (352_000_000,) * 32, (352_000_000,) * 32, (0,) * 32, 8, 2)


def economics(cost: float, *, most: int = 7, uses_clock: bool = False, expected: float = 0.5) -> Economics:
    """A round of k costs 1 + k x ``cost`` plain steps, as predicted."""
    return Economics(most, lambda k: 1 + k * cost, expected_acceptance=expected, uses_clock=uses_clock)


def after_trials(made: Economics, accepted: int, proposed: int, rounds: int = 12) -> Economics:
    for _ in range(rounds):
        made.round(0, proposed, accepted, 0.0)
    return made


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 16])
def test_distinct_experts_are_those_that_chance_chooses(tokens: int) -> None:
    random = np.random.default_rng(tokens)
    counts = [
        len({int(expert) for _ in range(tokens) for expert in random.choice(8, 2, replace=False)}) for _ in range(2000)
    ]
    assert distinct_experts(8, 2, tokens) == pytest.approx(np.mean(counts), abs=0.1)


def test_what_the_cost_model_says_of_8x7b() -> None:
    cost = ForwardCost(MIXTRAL)
    plain = cost.seconds(1)
    assert MIXTRAL.trunk_bytes / (MIXTRAL.trunk_bytes + 64 * 352_000_000) == pytest.approx(0.12, abs=0.01)
    relative = {n: round(cost.seconds(n) / plain, 1) for n in (1, 2, 4, 15, 16)}
    assert relative == {1: 1.0, 2: 1.9, 4: 3.6, 15: 13.3, 16: 3.6}


def test_a_dense_model_costs_what_one_token_costs() -> None:
    cost = ForwardCost(ModelSizes(14_000_000_000, (), (), (), 1, 1))
    assert cost.seconds(16) == cost.seconds(1) > 0


def test_experts_on_disk_cost_the_wait_for_those_that_are_missed() -> None:
    speeds = Speeds(disk_bytes_per_s=1e9, memory_bytes_per_s=1e11, readback_s=1e-3)
    cost = ForwardCost(MIXTRAL, speeds, slots=(4,) * 32, hit_rates=(0.5,) * 32)
    trunk, read, load = 3.21e9 / 1e11, 0.352e9 / 1e11, 0.352
    one = trunk + 32 * (2 * read + 1e-3 + (1 * load - 1 * read))
    assert cost.seconds(1) == pytest.approx(one)
    # Eight tokens want 7.2 experts of which four have a slot: 3.6 by the hit rate, no fewer than 3.2.
    distinct = distinct_experts(8, 2, 8)
    missed = distinct * 0.5
    eight = trunk + 32 * (16 * read + 1e-3 + missed * load - (distinct - missed) * read)
    assert cost.seconds(8) == pytest.approx(eight)
    resident = ForwardCost(MIXTRAL, speeds, slots=(8,) * 32, hit_rates=(1.0,) * 32)
    assert resident.seconds(4) == pytest.approx(trunk + 32 * 8 * read)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_expected_tokens_are_the_mean_of_rounds(acceptance: float) -> None:
    random = np.random.default_rng(1)
    right = random.random((20_000, 5)) < acceptance
    assert expected_tokens(acceptance, 5) == pytest.approx(np.mean(np.cumprod(right, axis=1).sum(axis=1) + 1), abs=0.05)


def test_acceptance_follows_what_it_saw() -> None:
    seen = Acceptance(0.5)
    assert seen.rate == 0.5
    seen.saw(200, 0)
    assert seen.rate > 0.94
    seen.saw(0, 200)
    assert seen.rate < 0.06


def test_the_best_count_is_the_one_that_gives_most_tokens_a_second() -> None:
    """At 9 of 10 right and a quarter of a step for each: (1 - 0.9^(k + 1)) / 0.1 over 1 + k / 4, by hand."""
    made = economics(0.25, most=15, expected=0.9)
    by_hand = {k: (1 - 0.9 ** (k + 1)) / 0.1 / (1 + k / 4) for k in (1, 2, 3, 5, 7, 11, 15)}
    assert made.choose(0, 15) == max(by_hand, key=by_hand.__getitem__) == 5
    assert made.choose(0, 2) == 2
    assert made.choose(0, 0) == 0


def test_never_right_is_off_and_always_right_is_on() -> None:
    assert after_trials(economics(0.1), accepted=0, proposed=3).choose(0, 7) == 0
    assert after_trials(economics(0.1), accepted=3, proposed=3).choose(0, 7) == 7
    # A round that costs more than its tokens is off however right it is.
    assert after_trials(economics(1.2), accepted=3, proposed=3).choose(0, 7) == 0


def test_guesses_that_were_compared_count_as_proposals() -> None:
    made = after_trials(economics(0.4), accepted=0, proposed=3)
    for _ in range(40):
        made.guessed(0, right=True)
    assert made.choose(0, 7) > 0
    assert made.acceptance(0) > 0.7
    assert made.acceptance(1) == 0.5, "another kind has its own"
    for _ in range(40):
        made.guessed(0, right=False)
    assert made.choose(0, 7) == 0


def test_off_is_tried_again_ever_more_rarely() -> None:
    made, tried, count = economics(0.5), [], 1500
    for at in range(count):
        if made.choose(0, 7):
            tried.append(at)
            made.round(0, 3, 0, 0.0)
        else:
            made.plain(0.0)
    trials = [a for a, b in zip(tried, [-9, *tried], strict=False) if a - b > 1]
    gaps = np.diff(trials)
    assert gaps[0] < 1.5 * RETRY_TOKENS
    assert all(later > 1.8 * earlier for earlier, later in pairwise(gaps))
    assert len(tried) < 0.02 * count


def test_measured_seconds_overrule_the_prediction() -> None:
    """Predicted to be cheap, found to cost five plain steps."""
    made = economics(0.05, uses_clock=True, expected=0.95)
    assert made.choose(0, 7) == 0, "what a plain step takes is not known yet"
    for _ in range(3):
        made.plain(1.0)
    assert made.choose(0, 7) == 7
    for _ in range(6):
        made.round(0, 7, 3, 5.0)
    assert made.seconds(7) == 5.0
    assert made.seconds(5) == pytest.approx(5.0 * 1.25 / 1.35), "as wrong as the nearest that was measured"
    tried = []
    while proposed := made.choose(0, 7):
        tried.append(proposed)
        made.round(0, proposed, proposed - 1, 5.0)
    assert len(tried) < 20
    assert made.acceptance(0) > 0.5


def test_without_the_clock_seconds_change_nothing() -> None:
    decisions = []
    for scale in (1e-6, 1e3):
        made, random, path = economics(0.2), np.random.default_rng(0), []
        for _ in range(300):
            count = made.choose(0, 7)
            path.append(count)
            if count:
                made.round(0, count, int(random.integers(count + 1)), scale * random.random())
            else:
                made.plain(scale * random.random())
        decisions.append(path)
    assert decisions[0] == decisions[1]
    assert len(set(decisions[0])) > 1


def test_not_adaptive_is_always_all_it_may() -> None:
    made = Economics(7, lambda k: 1 + 9.0 * k, expected_acceptance=0.0, is_adaptive=False)
    assert [made.choose(0, most) for most in (0, 3, 7, 20)] == [0, 3, 7, 7]
