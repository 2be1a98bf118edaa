"""XTC against mlx-lm's, and its distribution by counting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import SamplingParams
from mlx_mixtral.generation.sampling import Sampler
from tests.generation.speculation.support import assert_follows, truncated

VOCAB = 12
LOGITS = (np.random.default_rng(5).standard_normal(VOCAB) * 1.5).astype(np.float32)


def _kept(logits: np.ndarray[Any, Any], special: list[int] = [], **params: Any) -> set[int]:  # noqa: B006
    sampler = Sampler(SamplingParams(**params), [1], len(logits), xtc_special_tokens=special)
    found = np.asarray(sampler.log_probabilities(mx.array(logits[None])))[0]
    return {int(token) for token in np.flatnonzero(np.isfinite(found))}


@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=VOCAB),
    threshold=st.floats(0, 0.5),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    special=st.lists(st.integers(0, 1), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_what_is_left_out_is_what_mlx_lm_leaves_out(
    logits: list[float], threshold: float, temperature: float, special: list[int]
) -> None:
    """Whatever the temperature: mlx-lm applies it afterwards."""
    from mlx_lm.sample_utils import apply_xtc

    array = np.array(logits, np.float32)
    mx.disable_compile()  # it would compile each threshold anew
    try:
        theirs = np.asarray(apply_xtc(mx.array(array[None]), 1.0, threshold, special))[0]
    finally:
        mx.enable_compile()
    ours = _kept(array, special, temperature=temperature, xtc_probability=1.0, xtc_threshold=threshold)
    assert ours == {int(token) for token in np.flatnonzero(np.isfinite(theirs))}


def test_the_order_is_that_of_llama_cpp() -> None:
    """top-k, top-p and min-p first: XTC looks at what they leave."""
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
    given: dict[str, Any] = {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.35}
    # Only one token is above the threshold, until the other two are cut off: 0.4 and 0.3 are then 0.57 and 0.43.
    assert _kept(logits, **given) == {0, 1, 2, 3}
    for cut in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.7}, {"top_k": 3, "top_p": 0.7}):
        assert _kept(logits, **cut, **given) == {2}, cut
        assert _kept(logits, [1], **cut, **given) == {1, 2}, cut


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "xtc_probability": 0.5},
        {"temperature": 0.7, "xtc_probability": 0.3, "xtc_threshold": 0.05, "top_k": 8},
        {"temperature": 1.6, "xtc_probability": 1.0, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_and_the_seed(params: dict[str, Any]) -> None:
    given = SamplingParams(**params, seed=3)
    samplers = [Sampler(given, [1], VOCAB) for _ in range(2)]
    draws = [[int(sampler(mx.array(LOGITS[None])).token.item()) for _ in range(1000)] for sampler in samplers]
    assert draws[0] == draws[1]
    wanted = truncated(LOGITS.astype(np.float64), given)
    assert_follows(
        dict(Counter((token,) for token in draws[0])), {(token,): float(wanted[token]) for token in range(VOCAB)}
    )


def test_the_coin_is_no_draw_of_the_token() -> None:
    """With nothing above the threshold the text of a seed is the one without XTC."""
    for seed in range(4):
        plain, xtc = (
            Sampler(SamplingParams(temperature=1.0, seed=seed, xtc_probability=p, xtc_threshold=0.5), [1], VOCAB)
            for p in (0.0, 0.7)
        )
        flat = mx.array(LOGITS[None] * 0.1)
        assert [plain(flat).token.item() for _ in range(20)] == [xtc(flat).token.item() for _ in range(20)]


def test_greedy_stays_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(xtc_probability=1.0), [1], VOCAB)
    assert int(sampler(mx.array(LOGITS[None])).token.item()) == int(LOGITS.argmax())
