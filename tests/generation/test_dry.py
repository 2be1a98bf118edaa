"""DRY against its description tried out by hand, whatever way the tokens came: prompt, one by one, proposed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import SamplingParams
from mlx_mixtral.generation.sampling import Sampler
from tests.generation.dry_by_hand import dry_penalties

VOCAB = 6
LOGITS = (np.random.default_rng(4).standard_normal(VOCAB) * 2).astype(np.float32)
TOKENS = st.lists(st.integers(0, 3), max_size=24)


def _sampler(prompt: list[int], breakers: frozenset[tuple[int, ...]] = frozenset(), **params: Any) -> Sampler:
    return Sampler(SamplingParams(dry_multiplier=0.8, **params), prompt, VOCAB, dry_breakers=breakers)


def _lost(sampler: Sampler, drafted: list[int]) -> np.ndarray[Any, Any]:
    """What the logits of each of the next positions lose, ``[N, V]``."""
    logits = mx.array(np.tile(LOGITS, (len(drafted) + 1, 1)))
    return np.tile(LOGITS, (len(drafted) + 1, 1)) - np.asarray(
        sampler.adjusted(logits, mx.array(drafted, mx.int32) if drafted else None)
    )


@given(
    prompt=TOKENS,
    output=TOKENS,
    drafted=st.lists(st.integers(0, 3), max_size=4),
    base=st.sampled_from([1.0, 1.75]),
    allowed=st.integers(1, 3),
    last_n=st.sampled_from([-1, 1, 3, 7, 12]),
    breakers=st.frozensets(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_penalties_are_those_found_by_hand(
    prompt: list[int],
    output: list[int],
    drafted: list[int],
    base: float,
    allowed: int,
    last_n: int,
    breakers: frozenset[tuple[int, ...]],
) -> None:
    params = {"dry_base": base, "dry_allowed_length": allowed, "dry_penalty_last_n": last_n}
    sampler = _sampler(prompt, breakers, **params)
    for token in output[:3]:
        sampler.record(mx.array([token]))
    if output[3:]:
        sampler.record(mx.array(output[3:]))
    lost = _lost(sampler, drafted)
    for position in range(len(drafted) + 1):
        seen = [*prompt, *output, *drafted[:position]]
        wanted = dry_penalties(seen, 0.8, base, allowed, last_n, breakers)
        np.testing.assert_allclose(lost[position], [wanted.get(token, 0.0) for token in range(VOCAB)], atol=2e-5)


def test_the_example_of_the_description() -> None:
    """After "the quick brown fox … the quick brown" the fox loses 0.8 * 1.75, for three tokens where two are allowed."""
    the, quick, brown, fox, other = range(5)
    prompt = [the, quick, brown, fox, other, the, quick, brown]
    lost = _lost(_sampler(prompt), [])[0]
    np.testing.assert_allclose(lost, [0, 0, 0, 0.8 * 1.75, 0, 0], atol=1e-6)
    # The name that begins each line may come again.
    assert not _lost(_sampler(prompt, frozenset({(brown,)})), []).any()
    assert _lost(_sampler(prompt, frozenset({(the,)})), [])[0][fox] == pytest.approx(0.8)


def test_a_very_long_repetition_is_a_large_number_not_nan() -> None:
    sampler = _sampler([1] * 3000, dry_base=4.0)
    adjusted = np.asarray(sampler.adjusted(mx.array(LOGITS[None])))[0]
    assert np.isfinite(adjusted).all()
    assert adjusted[1] < -1e37
    assert int(sampler(mx.array(LOGITS[None])).token.item()) != 1


@pytest.mark.parametrize(
    "params", [{"dry_multiplier": 0.0}, {"dry_multiplier": 1.0, "dry_penalty_last_n": 0}], ids=["multiplier", "last_n"]
)
def test_off_is_off(params: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(**params), [1, 2, 1, 2, 1], VOCAB)
    assert (np.asarray(sampler.adjusted(mx.array(LOGITS[None])))[0] == LOGITS).all()
    assert sampler.is_plain
    assert not _sampler([1]).is_plain


def test_a_fork_leaves_the_original_where_it_was() -> None:
    sampler = _sampler([1, 2, 3, 1])
    other = sampler.fork()
    other.record(mx.array([2]))
    assert _lost(other, [])[0][3] == pytest.approx(0.8)
    assert not _lost(sampler, []).any()
