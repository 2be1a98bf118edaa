"""Sampling against numpy: distributions by counting, penalties by hand, ranges by trying."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import SamplingParams
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.sampling import Sampler

VOCAB = 24
LOGITS = (np.random.default_rng(4).standard_normal(VOCAB) * 2).astype(np.float32)


def _sampler(prompt: list[int] | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt or [1], VOCAB)


def _draws(count: int, **params: Any) -> np.ndarray[Any, Any]:
    sampler = _sampler(**params)
    return np.array([int(sampler(mx.array(LOGITS[None])).token.item()) for _ in range(count)])


def _probabilities(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(shifted / shifted.sum())


def _wanted(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray[Any, Any]:
    """The distribution sampling should follow, in float64 and loops."""
    p = _probabilities(LOGITS / temperature)
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
        p /= p.sum()
    reached, kept = 0.0, []
    for token in np.argsort(-p):
        if reached >= top_p:
            break
        kept.append(token)
        reached += p[token]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    q[q < min_p * q.max()] = 0
    return np.asarray(q / q.sum())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    count = 3000
    wanted = _wanted(**params)
    seen = np.bincount(_draws(count, seed=11, **params), minlength=VOCAB)
    assert seen[wanted == 0].sum() == 0, "a token that was cut off was drawn"
    expected = wanted[wanted > 0] * count
    chi2 = float(((seen[wanted > 0] - expected) ** 2 / expected).sum())
    freedom = int((wanted > 0).sum()) - 1
    # 99.99% of a chi-square with k degrees of freedom lies below k + 3.9 sqrt(2k) + 12; the seed is fixed.
    assert chi2 < freedom + 3.9 * math.sqrt(2 * freedom) + 12


# Probabilities in tenths: cut-offs fall where these say, and no other reading of the order gives the same.
TENTHS = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))[None]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        # Of what top-k left, 0.4 / 0.7 reaches 0.5: of all tokens 0.4 would not.
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
        # min-p is of the likeliest token's share, whatever was cut off before, and after the temperature.
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 3, "min_p": 0.3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5, "min_p": 0.6}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.65, "min_p": 0.8}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_filters_apply_in_their_order_each_to_what_the_last_left(params: dict[str, Any], wanted: list[float]) -> None:
    sampler = Sampler(SamplingParams(**({"temperature": 1.0, "seed": 3} | params)), [1], 4)
    found = np.exp(np.array(sampler.log_probabilities(mx.array(TENTHS))))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    drawn = {int(sampler(mx.array(TENTHS)).token.item()) for _ in range(60)}
    assert drawn == set(np.flatnonzero(wanted))


def test_a_token_that_ends_just_at_top_p_is_the_last() -> None:
    halves = mx.array(np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)))
    for top_p, kept in ((0.5, 1), (0.75, 2), (0.76, 3)):
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p), [1], 4)
        assert int(mx.isfinite(sampler.log_probabilities(halves)).sum().item()) == kept


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 1.5}, {"frequency_penalty": 0.75}, {"repetition_penalty": 1.2}]
)
def test_each_penalty_works_without_the_others(params: dict[str, float]) -> None:
    sampler = _sampler([3], **params)
    sampler.record(mx.array([5]))
    sampler.record(mx.array([5]))
    change = np.asarray(sampler.adjusted(mx.array(LOGITS[None])))[0] - LOGITS
    wanted = np.zeros(VOCAB)
    if "repetition_penalty" in params:
        for token in (3, 5):
            wanted[token] = LOGITS[token] / 1.2 - LOGITS[token] if LOGITS[token] > 0 else LOGITS[token] * 0.2
    else:
        wanted[5] = -1.5  # once for presence, twice 0.75 for frequency
    np.testing.assert_allclose(change, wanted, atol=1e-5)


def test_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = (_draws(40, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_seeds_of_any_sign_and_size_work_and_neighbours_are_unrelated() -> None:
    draws = {seed: tuple(_draws(30, temperature=1.5, seed=seed)) for seed in (-1, 0, 1, 2, 2**40, -(2**63), 2**80)}
    assert len(set(draws.values())) == len(draws)
    # A shifted stream would make seed 1 the continuation of seed 0.
    assert draws[0][1:] != draws[1][:-1]


def test_no_seed_differs_between_samplers() -> None:
    assert len({tuple(_draws(30, temperature=1.5)) for _ in range(3)}) == 3


def test_greedy_takes_the_largest_whatever_the_filters() -> None:
    assert set(_draws(5, top_p=0.1, top_k=3, min_p=0.5)) == {int(LOGITS.argmax())}


@given(
    repetition=st.floats(0.5, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_penalties_and_bias_by_hand(
    repetition: float, presence: float, frequency: float, history: list[int], prompt: list[int]
) -> None:
    bias = {3: 1.5, 7: -4.0}
    sampler = _sampler(
        prompt,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    for token in history:
        sampler.record(mx.array([token]))
    ours = np.asarray(sampler.adjusted(mx.array(LOGITS[None])))[0]
    for token in range(VOCAB):
        wanted = float(LOGITS[token])
        if token in history or token in prompt:
            wanted = wanted / repetition if wanted > 0 else wanted * repetition
        if token in history:
            wanted -= presence + frequency * history.count(token)
        assert ours[token] == pytest.approx(wanted + bias.get(token, 0), abs=1e-4)


def test_presence_penalty_counts_what_was_generated_not_the_prompt() -> None:
    best = int(LOGITS.argmax())
    assert int(_sampler([best], presence_penalty=50)(mx.array(LOGITS[None])).token.item()) == best
    sampler = _sampler(presence_penalty=50)
    drawn = [int(sampler(mx.array(LOGITS[None])).token.item()) for _ in range(3)]
    assert drawn == list(np.argsort(-LOGITS)[:3])


def test_bias_of_minus_infinity_bans_a_token() -> None:
    best = int(LOGITS.argmax())
    assert int(_sampler(logit_bias={best: -math.inf})(mx.array(LOGITS[None])).token.item()) != best


def test_logprobs_are_the_models_own() -> None:
    sampler = _sampler(temperature=3.0, top_k=2, repetition_penalty=2.0, logit_bias={0: 9.0}, logprobs=4, seed=1)
    sampled = sampler(mx.array(LOGITS[None]))
    wanted = np.log(_probabilities(LOGITS))
    assert sampled.logprob is not None
    assert sampled.top_ids is not None
    assert float(sampled.logprob.item()) == pytest.approx(wanted[int(sampled.token.item())], abs=1e-5)
    assert sampled.top_ids.tolist() == list(np.argsort(-LOGITS)[:4])
    np.testing.assert_allclose(np.asarray(sampled.top_logprobs), np.sort(wanted)[::-1][:4], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.01), ("min_p", 1.5), ("min_p", -0.1), ("top_k", -1), ("top_k", 2.5),
        ("repetition_penalty", 0), ("presence_penalty", math.inf),
        ("xtc_probability", 1.1), ("xtc_probability", None), ("xtc_threshold", 0.51), ("dry_multiplier", -1),
        ("dry_multiplier", math.inf), ("dry_base", 0.9), ("dry_allowed_length", 0), ("dry_allowed_length", None),
        ("dry_penalty_last_n", -2), ("dry_sequence_breakers", "\n"), ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", [1]), ("frequency_penalty", math.nan), ("seed", 1.5), ("seed", True), ("logprobs", -1),
        ("logprobs", 101), ("logit_bias", {-1: 1.0}), ("logit_bias", {2: math.nan}), ("logit_bias", {"a": 1.0}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_bias_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"token 24.*24"):
        _sampler(logit_bias={24: 1.0})
