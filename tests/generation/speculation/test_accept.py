"""Speculative text has the distribution of plain text: chi-square tests against probabilities written down in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import SamplingParams
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.accept import verify
from mlx_mixtral.generation.speculation.draft import DraftProposer
from mlx_mixtral.generation.speculation.lookup import LookupProposer
from mlx_mixtral.generation.speculation.proposal import Proposal, Proposer
from tests.generation.speculation.support import (
    Chain,
    assert_follows,
    chain,
    context_of,
    ids_of,
    plain,
    sequence_probabilities,
    speculated,
    truncated,
)

VOCAB = 5
PROMPT = [0, 3, 1, 0]
RUNS, POSITIONS = 300, 800
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 3, "min_p": 0.15},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.8, "frequency_penalty": 0.7, "logit_bias": {2: 1.0}},
]
# Every position has a coin: what is proposed and what judges it are to see the same one.
XTC_AND_DRY: dict[str, Any] = {
    "temperature": 1.4, "top_p": 0.95, "xtc_probability": 0.5, "xtc_threshold": 0.15, "dry_multiplier": 0.8,
    "dry_base": 1.5, "dry_allowed_length": 1, "dry_sequence_breakers": (),
}  # fmt: skip


def _drafted_by(draft: Chain, most: int) -> Proposer:
    return DraftProposer(context_of(draft, chunk_tokens=8), PROMPT, max_tokens=64, max_proposed=most)


@pytest.mark.parametrize(
    ("proposes", "params"),
    [
        ("lookup", SAMPLINGS[2]),
        ("draft", SAMPLINGS[0]),
        ("draft", SAMPLINGS[4]),
        ("lookup", XTC_AND_DRY),
        ("draft", XTC_AND_DRY),
    ],
    ids=str,
)
def test_sequences_follow_the_models_own_distribution(proposes: str, params: dict[str, Any]) -> None:
    """The first token is plain; the second and third come from a round of up to two proposals."""
    model, draft = chain(VOCAB, seed=1), chain(VOCAB, seed=2)
    seen: Counter[tuple[int, ...]] = Counter()
    accepted = proposed = 0
    for seed in range(RUNS):
        proposer = LookupProposer(PROMPT, 3) if proposes == "lookup" else _drafted_by(draft, 2)
        sampling = SamplingParams(**params, seed=seed)
        tokens, stats = speculated(model, PROMPT, proposer, 4, sampling, most=2)
        seen[tuple(ids_of(tokens)[:3])] += 1
        assert stats.speculation is not None
        accepted, proposed = accepted + stats.speculation.accepted, proposed + stats.speculation.proposed
    assert 0.1 < accepted / proposed < 0.9, "both ways to a token are to be taken often"
    assert_follows(seen, sequence_probabilities(model, PROMPT, 3, SamplingParams(**params)))


@pytest.mark.parametrize(
    ("shared", "params"),
    [(share, SAMPLINGS[at]) for share, at in ((0.0, 0), (0.5, 1), (1.0, 2), (0.5, 2), (0.0, 3), (0.5, 3))],
    ids=str,
)
def test_each_position_follows_p_however_far_q_is(shared: float, params: dict[str, Any]) -> None:
    """Proposals drawn from q, judged by p: from unrelated to equal distributions. Without penalties positions are apart."""
    p_logits, other = (np.random.default_rng(seed).standard_normal(VOCAB) * 1.5 for seed in (5, 6))
    q_logits = shared * p_logits + (1 - shared) * other
    sampling = SamplingParams(**params, seed=7)
    sampler = Sampler(sampling, PROMPT, VOCAB)
    log_q = sampler.log_probabilities(mx.array(np.tile(q_logits, (POSITIONS, 1)).astype(np.float32)))
    proposed = mx.random.categorical(log_q, key=mx.random.key(8)).astype(mx.int32)
    logits = mx.array(np.tile(p_logits, (POSITIONS + 1, 1)).astype(np.float32))
    tokens = np.asarray(verify(sampler, logits, Proposal(proposed, log_q)).tokens)
    p, q = truncated(p_logits, sampling), truncated(q_logits, sampling)
    assert_follows(Counter((int(token),) for token in tokens), {(token,): float(p[token]) for token in range(VOCAB)})
    # As many are kept as can be: all but the distance of the distributions.
    kept = float(np.mean(tokens[:-1] == np.asarray(proposed)))
    assert kept == pytest.approx(float(np.minimum(p, q).sum()), abs=4 * (0.25 / POSITIONS) ** 0.5)


@pytest.mark.parametrize("params", SAMPLINGS[2:], ids=str)
def test_the_draft_proposes_what_sampling_from_it_gives(params: dict[str, Any]) -> None:
    draft = chain(VOCAB, seed=2)
    proposals = [
        _drafted_by(draft, 2).propose(2, Sampler(SamplingParams(**params, seed=seed), PROMPT, VOCAB))
        for seed in range(RUNS)
    ]
    seen = Counter(tuple(row) for row in mx.stack([proposal.tokens for proposal in proposals]).tolist())
    assert_follows(seen, sequence_probabilities(draft, PROMPT, 2, SamplingParams(**params)))
    last, proposal = sequence_probabilities(draft, PROMPT, 2, SamplingParams(**params)), proposals[-1]
    assert proposal.log_probabilities is not None
    drawn = [mx.exp(proposal.log_probabilities[n, token]).item() for n, token in enumerate(proposal.tokens.tolist())]
    assert np.prod(drawn) == pytest.approx(last[tuple(proposal.tokens.tolist())], rel=1e-4)


@pytest.mark.parametrize("params", [*SAMPLINGS, XTC_AND_DRY], ids=str)
def test_lookup_gives_the_text_of_the_seed(params: dict[str, Any]) -> None:
    """More than the same distribution: every draw is the one plain decoding makes."""
    model = chain(VOCAB, seed=1)
    for seed in range(8):
        sampling = SamplingParams(**params, seed=seed, logprobs=2)
        wanted = plain(model, PROMPT, 12, sampling)
        tokens, stats = speculated(model, PROMPT, LookupProposer(PROMPT, 3), 12, sampling)
        assert tokens == wanted
        assert stats.speculation is not None
        assert stats.speculation.forwards <= 11


def test_a_seed_gives_the_same_text_again_with_a_draft() -> None:
    model, draft = chain(VOCAB, seed=1), chain(VOCAB, seed=2)
    texts = [
        ids_of(
            speculated(model, PROMPT, _drafted_by(draft, 3), 20, SamplingParams(temperature=1, seed=seed), most=3)[0]
        )
        for seed in (4, 4, 5)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_draft_that_is_the_model_is_never_refused() -> None:
    model = chain(VOCAB, seed=1)
    sampling = SamplingParams(temperature=1.3, top_p=0.9, frequency_penalty=0.5, seed=8)
    _, stats = speculated(model, PROMPT, _drafted_by(model, 4), 41, sampling)
    assert stats.speculation is not None
    assert stats.speculation.acceptance == 1.0
    assert stats.speculation.tokens_per_forward == 5.0


def test_a_token_that_p_excludes_never_stays_and_one_that_q_excludes_can_come() -> None:
    p_logits = np.array([[2.0, 1.0, -50.0, -50.0, -50.0]] * 2, np.float32)
    log_q = mx.array([[-np.inf, -np.inf, 0.0, -np.inf, -np.inf]], mx.float32)
    for seed in range(30):
        sampler = Sampler(SamplingParams(temperature=1.0, top_k=2, seed=seed), PROMPT, VOCAB)
        verified = verify(sampler, mx.array(p_logits), Proposal(mx.array([2], mx.int32), log_q))
        assert verified.accepted.item() == 0
        assert verified.tokens[0].item() in (0, 1)
