"""Continuations past the trained context, where rotary frequencies follow the length: each as if it were asked for alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.evaluation.harness.encoding import Pair
from mlx_mixtral.evaluation.harness.scoring import Answer, score_pairs

RECORDED = Path(__file__).parents[2] / "goldens" / "transformers"


@pytest.mark.parametrize("case", ["rope_dynamic_greedy", "rope_longrope_greedy"])
def test_batches_and_shared_contexts_leave_answers_as_they_are(case: str) -> None:
    ids = [int(token) for token in np.random.default_rng(2).integers(3, 64, 40)]
    lengths = (12, 14, 15, 16, 17, 18, 24, 25, 26)
    pairs = [
        Pair(tuple(ids[at : at + size - 2]), tuple(ids[at + size - 2 : at + size])) for size in lengths for at in (0, 5)
    ]
    # Answers of one question: a context of 15 tokens, past which only the longer ones reach.
    pairs += [Pair(tuple(ids[:15]), tuple(ids[20 : 20 + size])) for size in (1, 2, 3, 5)]
    answers: dict[int, Answer] = {}
    with load(RECORDED / case) as model:
        score_pairs(model, pairs, 16, answers.__setitem__)
        for index, pair in enumerate(pairs):
            read = [*pair.context, *pair.continuation][:-1]
            logits = np.asarray(model.module(mx.array([read])))[0, len(pair.context) - 1 :].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            wanted = sum(logprobs[place, token] for place, token in enumerate(pair.continuation))
            assert answers[index].logprob == pytest.approx(wanted, abs=1e-4), (index, pair)
