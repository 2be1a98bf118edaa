"""Figures of routing: hand-made traces with known answers, random routing, and a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.evaluation.routing import RoutingRecord, analyse
from mlx_mixtral.evaluation.routing.analysis import expected_pairs
from mlx_mixtral.evaluation.routing.published import PUBLISHED, mean_published, published_for
from mlx_mixtral.evaluation.statistics import mean_of
from mlx_mixtral.experts.trace import PUBLISHED_REPEATS, RoutingTrace


def record(
    experts: Any, num_experts: int = 8, starts: Sequence[int] = (0,), segments: Sequence[int] = (0,), **options: Any
) -> RoutingRecord:
    trace = RoutingTrace(np.asarray(experts, np.uint16), num_experts, tuple(starts))
    names = tuple(f"d{number}" for number in range(max(segments) + 1))
    return RoutingRecord(trace, names, np.asarray(segments, np.int64), **options)


def random_record(
    seed: int, tokens: int, layers: int, num_experts: int, per_token: int, stretches: int, domains: int
) -> RoutingRecord:
    random = np.random.default_rng(seed)
    experts = random.random((tokens, layers, num_experts)).argsort(axis=2)[..., :per_token]
    starts = [0, *sorted(random.choice(np.arange(1, tokens), stretches - 1, replace=False).tolist())]
    segments = [*range(domains), *random.integers(domains, size=stretches - domains).tolist()]
    random.shuffle(segments)
    return record(experts, num_experts, starts, segments)


# One layer, first choice first; a new text starts at the fifth token.
HAND = [[0, 1], [0, 2], [2, 0], [3, 1], [3, 0], [3, 1], [1, 3]]


def test_a_hand_made_trace() -> None:
    found = analyse(record(np.array(HAND)[:, None], 4, starts=(0, 4), segments=(0, 0))).overall
    assert (found.tokens, found.transitions) == (7, 5)
    # First choices 0 0 2 3 | 3 3 1, second ones 1 2 0 1 | 0 1 3.
    assert found.choice_shares.value[0, 0] == pytest.approx([2 / 7, 1 / 7, 1 / 7, 3 / 7])
    assert found.choice_shares.value[1, 0] == pytest.approx([2 / 7, 3 / 7, 1 / 7, 1 / 7])
    assert found.shares.value[0] == pytest.approx([4 / 14, 4 / 14, 2 / 14, 4 / 14])
    # 0-0 and 3-3 repeat; 3 | 3 is no pair. In common: 01-02, 02-20, not 20-31, 30-31, 31-13.
    assert found.repeats_first.value == pytest.approx([2 / 5])
    assert found.repeats_either.value == pytest.approx([4 / 5])
    assert found.repeats_first.stderr == pytest.approx([np.sqrt(0.4 * 0.6 / 4)])
    pairs = np.array([[0, 1, 2, 1], [1, 0, 0, 3], [2, 0, 0, 0], [1, 3, 0, 0]]) / 7
    assert found.pairs.value[0] == pytest.approx(pairs)
    assert found.entropy is None


def test_domains_are_counted_apart_and_all_together_by_token() -> None:
    experts = [[0], [0], [0], [1], [1], [0]]
    found = analyse(record(np.array(experts)[:, None], 2, starts=(0, 2, 5), segments=(0, 1, 0)))
    assert [domain.tokens for domain in found.domains.values()] == [3, 3]
    assert found.domains["d0"].shares.value[0] == pytest.approx([1, 0])
    assert found.domains["d1"].shares.value[0] == pytest.approx([1 / 3, 2 / 3])
    assert found.overall.shares.value[0] == pytest.approx([2 / 3, 1 / 3])
    assert found.domains["d0"].repeats_first.value == [1.0]
    assert found.domains["d1"].repeats_first.value == [0.5]
    assert found.overall.transitions == 3


def test_one_token_repeats_nothing() -> None:
    found = analyse(record([[[3, 1]]])).overall
    assert found.transitions == 0
    assert np.isnan(found.repeats_first.value).all()
    assert np.isnan(found.shares.stderr).all()
    assert found.to_dict(with_pairs=True)["tokens"] == 1


def test_random_routing_repeats_as_often_as_chance() -> None:
    tokens = 40_000
    found = analyse(random_record(3, tokens, 4, 8, 2, stretches=5, domains=1))
    assert found.chance_first == 0.125
    assert found.chance_either == pytest.approx(1 - 6 / 8 * 5 / 7)
    for chance, estimate in (
        (found.chance_first, found.overall.repeats_first),
        (found.chance_either, found.overall.repeats_either),
        (1 / 8, found.overall.shares),
    ):
        assert (np.abs(estimate.value - chance) < 4 * estimate.stderr).all()
        # Not by luck of a large error: that of independent draws, or less.
        assert estimate.stderr == pytest.approx(
            np.full_like(estimate.stderr, np.sqrt(chance * (1 - chance) / tokens)), rel=0.45
        )
    lift = found.overall.pair_lift[:, *np.triu_indices(8, 1)]
    assert lift == pytest.approx(np.ones_like(lift), abs=0.15)
    assert found.overall.effective_experts == pytest.approx(np.full(4, 8), abs=0.01)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(8, 300), st.data())
def test_figures_are_those_of_a_loop_over_tokens(seed: int, tokens: int, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    check_against_a_loop(seed, tokens, num_experts, data.draw(st.integers(1, num_experts)))


def test_figures_of_many_blocks_are_those_of_a_loop() -> None:
    check_against_a_loop(1, 9000, 4, 2)


def check_against_a_loop(seed: int, tokens: int, num_experts: int, per_token: int) -> None:
    made = random_record(seed, tokens, 2, num_experts, per_token, stretches=4, domains=3)
    ends = [*made.starts[1:], tokens]
    for number, domain in enumerate(analyse(made).domains.values()):
        for layer in range(2):
            shares: list[list[float]] = []
            repeats: list[tuple[float, float]] = []
            blocks: tuple[list[int], list[int]] = ([], [])
            pairs = np.zeros((num_experts, num_experts))
            for stretch, (start, end, own) in enumerate(zip(made.starts, ends, made.segments.tolist(), strict=True)):
                if own != number:
                    continue
                for token in range(start, end):
                    chosen = made.trace.experts[token, layer].tolist()
                    shares.append([(expert in chosen) / per_token for expert in range(num_experts)])
                    blocks[0].append(1000 * stretch + (token - start) // 64)
                    for a, b in combinations(chosen, 2):
                        pairs[a, b] += 1
                        pairs[b, a] += 1
                    if token + 1 < end:
                        after = made.trace.experts[token + 1, layer].tolist()
                        repeats.append((float(chosen[0] == after[0]), float(bool(set(chosen) & set(after)))))
                        blocks[1].append(1000 * stretch + (token - start) // 64)
            assert (domain.tokens, domain.transitions) == (len(shares), len(repeats))
            assert domain.pairs.value[layer] == pytest.approx(pairs / len(shares))
            for expert in range(num_experts):
                mean = mean_of(np.array(shares)[:, expert], np.array(blocks[0]))
                assert domain.shares.value[layer, expert] == pytest.approx(mean.value)
                assert domain.shares.stderr[layer, expert] == pytest.approx(mean.stderr, nan_ok=True)
            for kind, estimate in enumerate((domain.repeats_first, domain.repeats_either)):
                if repeats:
                    mean = mean_of(np.array(repeats)[:, kind], np.array(blocks[1]))
                    assert estimate.value[layer] == pytest.approx(mean.value)
                    assert estimate.stderr[layer] == pytest.approx(mean.stderr, nan_ok=True)


def test_entropy_is_averaged_by_domain() -> None:
    entropy = np.array([[1.0], [2.0], [0.5]], np.float16)
    found = analyse(record([[[0, 1]], [[1, 0]], [[2, 3]]], starts=(0, 2), segments=(0, 1), entropy=entropy))
    values = [domain.entropy.value[0] for domain in found.domains.values() if domain.entropy is not None]
    assert values == [1.5, 0.5]
    assert found.overall.entropy is not None
    assert found.overall.entropy.value[0] == pytest.approx(3.5 / 3)


def test_chance_pairs_use_each_expert_as_often_and_none_with_itself() -> None:
    # 0 with 1 and 2 with 3 only: by chance each would meet all three others alike.
    apart = np.zeros((4, 4))
    apart[[0, 1, 2, 3], [1, 0, 3, 2]] = 0.5
    assert expected_pairs(apart) == pytest.approx((1 - np.eye(4)) / 6)
    # Of three experts row sums leave no freedom: every table is what chance gives.
    three = np.array([[0, 0.5, 0.2], [0.5, 0, 0.3], [0.2, 0.3, 0]])
    assert expected_pairs(three) == pytest.approx(three, abs=1e-9)
    # Made of q_i q_j, found again, with an expert nobody uses.
    q = np.array([0.5, 0.3, 0.7, 0.2, 0.0, 0.4])
    made = np.outer(q, q) * (1 - np.eye(6))
    assert expected_pairs(made) == pytest.approx(made, abs=1e-9)
    assert not expected_pairs(np.zeros((3, 3))).any()


def test_pairs_that_chance_gives_too_few_tokens_are_left_out() -> None:
    experts = [[0, 1]] * 100 + [[2, 3]] * 100 + [[0, 4]]
    found = analyse(record(np.array(experts)[:, None], 8)).overall
    assert set(found.clear_pairs(0)) <= set(combinations(range(4), 2))
    assert found.clear_pairs(0)[0] in {(0, 1), (2, 3)}
    assert found.pair_lift[0, 0, 4] > 0


def test_the_papers_figures_are_found_by_kind_of_text() -> None:
    for name, domain in (
        ("code", "GitHub"),
        ("Math", "DM Mathematics"),
        ("wikipedia", "Wikipedia (en)"),
        ("arXiv", "ArXiv"),
    ):
        row = published_for(name)
        assert row is not None
        assert row.domain == domain
    assert published_for("fr") is None
    mean = mean_published()
    # The same table, transcribed for the planner.
    assert mean.either == pytest.approx(tuple(PUBLISHED_REPEATS.values()), abs=1e-4)
    assert len(PUBLISHED) == 8
