"""Decoding with speculation beside plain decoding: the same tokens, no position more, the cache as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import KVCache, Mixtral, SamplingParams, load
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.draft import DraftProposer
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.lookup import LookupProposer
from mlx_mixtral.generation.speculation.proposal import Guess
from mlx_mixtral.model.step import DecodeStep
from tests.experts.support import converted, streamed
from tests.generation.speculation.support import (
    Chain,
    ChainCache,
    Told,
    always,
    chain,
    context_of,
    dense_of,
    ids_of,
    plain,
    speculated,
)

VOCAB = 12
PROMPT = [3, 1, 4, 1, 5]
PSALM = "And the LORD said unto Moses, Speak unto the children of Israel, and say unto them: Speak unto the children of"


@pytest.fixture(scope="module")
def verse(model: Mixtral) -> list[int]:
    return model.tokenizer.encode(PSALM)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("packed") / "model", bits=4, group_size=32)


@pytest.fixture(scope="module", params=["4-bit", "dense"])
def draft(
    request: pytest.FixtureRequest, tiny: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mixtral]:
    folder = packed if request.param == "4-bit" else dense_of(tiny, tmp_path_factory.mktemp("dense") / "model")
    with load(folder) as loaded:
        yield loaded


def drafting(draft: Mixtral, prompt: list[int], *, max_tokens: int = 256, most: int = 4) -> DraftProposer:
    context = context_of(draft.module, DecodeStep(draft.module, compiled=False), chunk_tokens=16)
    return DraftProposer(context, prompt, max_tokens=max_tokens, max_proposed=most)


def on_model(model: Mixtral, prompt: list[int], proposer: Any, max_tokens: int, *args: Any, **options: Any) -> Any:
    step = DecodeStep(model.module, compiled=False)
    return speculated(model.module, prompt, proposer, max_tokens, *args, step=step, **options)


def plainly(model: Mixtral, prompt: list[int], max_tokens: int, *args: Any, **options: Any) -> list[Any]:
    return plain(model.module, prompt, max_tokens, *args, step=DecodeStep(model.module, compiled=False), **options)


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_tokens_are_those_of_plain_decoding_and_no_position_more(right: float, most: int) -> None:
    for max_tokens in (1, 2, 3, 9, 16):
        model, cache = chain(VOCAB, seed=3), ChainCache()
        wanted = plain(model, PROMPT, max_tokens)
        proposer = Told(ids_of(wanted), right, VOCAB)
        tokens, stats = speculated(model, PROMPT, proposer, max_tokens, most=most, cache=cache)
        assert tokens == wanted
        assert cache.longest <= len(PROMPT) + max_tokens - 1
        assert cache.length == len(PROMPT) + max_tokens - 1
        assert stats.tokens == max_tokens
        assert stats.speculation is not None
        assert stats.speculation.tokens == max_tokens - 1


def test_a_round_of_right_proposals_is_one_forward() -> None:
    model = chain(VOCAB, seed=3)
    truth = ids_of(plain(model, PROMPT, 31))
    model.forwards.clear()
    _, stats = speculated(model, PROMPT, Told(truth, 1.0, VOCAB), 31, most=5)
    assert model.forwards == [len(PROMPT)] + [6] * 5
    assert stats.speculation is not None
    assert stats.speculation.to_dict() == {
        "forwards": 5,
        "tokens_per_forward": 6.0,
        "proposed_tokens": 25,
        "accepted_tokens": 25,
        "acceptance": 1.0,
    }


@pytest.mark.parametrize("take", range(1, 9))
def test_closed_anywhere_the_cache_goes_on_from_what_was_yielded(
    short_model: Mixtral, verse: list[int], take: int
) -> None:
    model = short_model
    wanted = ids_of(plainly(model, verse, 14))
    cache = model.make_cache()
    proposer = Told(wanted, 0.8, model.config.vocab_size, seed=2)
    tokens, _ = on_model(model, verse, proposer, 14, most=3, cache=cache, take=take)
    assert ids_of(tokens) == wanted[:take]
    held = cache.length - len(verse)
    assert take - 1 <= held <= take
    rest = wanted[held:take] or wanted[take : take + 1]
    ahead = plainly(model, [*verse, *wanted[:held], *rest], 4, cache=cache)
    assert ids_of(ahead) == wanted[held + len(rest) :][:4]


def test_an_error_in_a_round_leaves_the_cache_with_what_was_yielded() -> None:
    model, cache = chain(VOCAB, seed=3), ChainCache()
    proposer = Told(ids_of(plain(model, PROMPT, 20)), 1.0, VOCAB)
    computed = 0

    def failing(tokens: mx.array, cache: ChainCache, **options: Any) -> mx.array:
        nonlocal computed
        computed += 1
        logits = model(tokens, cache, **options)
        if computed == 2:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        speculated(model, PROMPT, proposer, 20, most=4, cache=cache, step=failing)
    assert cache.length == len(PROMPT) + 6


@pytest.mark.parametrize("max_ngram", [1, 4])
def test_lookup_is_greedy_decoding(model: Mixtral, verse: list[int], max_ngram: int) -> None:
    wanted = plainly(model, verse, 40, SamplingParams(logprobs=2))
    tokens, stats = on_model(model, verse, LookupProposer(verse, max_ngram), 40, SamplingParams(logprobs=2), most=6)
    assert ids_of(tokens) == ids_of(wanted)
    for token, plain_token in zip(tokens, wanted, strict=True):
        assert token.logprob == pytest.approx(plain_token.logprob, abs=1e-4)
        assert [n for n, _ in token.top_logprobs] == [n for n, _ in plain_token.top_logprobs]
    assert stats.speculation.accepted > 0
    assert stats.speculation.accepted < stats.speculation.proposed


def test_lookup_at_temperature_is_the_text_of_the_seed(model: Mixtral, verse: list[int]) -> None:
    accepted = 0
    for seed in range(2):
        params = SamplingParams(temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=seed)
        tokens, stats = on_model(model, verse, LookupProposer(verse, 3), 24, params, most=5)
        assert ids_of(tokens) == ids_of(plainly(model, verse, 24, params))
        accepted += stats.speculation.accepted
    assert accepted > 0


def test_a_draft_gives_greedy_decoding(model: Mixtral, draft: Mixtral, verse: list[int]) -> None:
    tokens, stats = on_model(model, verse, drafting(draft, verse), 12)
    assert ids_of(tokens) == ids_of(plainly(model, verse, 12))
    if not draft.config.is_dense:
        assert stats.speculation.tokens_per_forward > 2


def test_what_the_draft_holds_after_refusals_is_the_sequence(draft: Mixtral, verse: list[int]) -> None:
    sampler = Sampler(SamplingParams(), verse, draft.config.vocab_size)
    proposer, sequence = drafting(draft, verse), list(verse)
    for accepted, count in ((0, 4), (2, 4), (4, 4), (0, 1)):
        proposed = proposer.propose(count, sampler).tokens.tolist()
        assert proposed == drafting(draft, sequence).propose(count, sampler).tokens.tolist()
        kept = [*proposed[:accepted], 77]
        proposer.take(kept, accepted)
        sequence += kept
        proposer.take([78])
        sequence.append(78)
    assert proposer.cache.length <= len(sequence)


def test_a_draft_whose_context_is_full_proposes_no_more(model: Mixtral, packed: Path, verse: list[int]) -> None:
    with load(packed) as draft:
        proposer = drafting(draft, verse, max_tokens=len(verse) + 12)
        tokens, stats = on_model(model, verse, proposer, 30)
        assert ids_of(tokens) == ids_of(plainly(model, verse, 30))
        assert proposer.guess() is None
        assert proposer.cache.length <= len(verse) + 12
        assert 0 < stats.speculation.proposed <= 12
        full = drafting(draft, verse, max_tokens=len(verse))
        _, stats = on_model(model, verse, full, 5)
        assert (stats.speculation.proposed, stats.speculation.forwards) == (0, 4)


@pytest.mark.parametrize("window", [9, 32])
def test_a_cache_of_bounded_size_takes_refused_tokens_back(short_model: Mixtral, verse: list[int], window: int) -> None:
    """The window is full when the prompt ends or soon after, and its columns are used again before the text ends."""
    model = short_model

    def bounded() -> KVCache:
        c = model.config
        return KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, window=window)

    params = SamplingParams(temperature=0.9, seed=3)
    wanted = ids_of(plainly(model, verse, 60, params, cache=bounded()))
    assert wanted != ids_of(plainly(model, verse, 60, params)), "the window is to matter"
    proposer, cache = Told(wanted, 0.8, model.config.vocab_size), bounded()
    tokens, stats = on_model(model, verse, proposer, 60, params, most=31, cache=cache)
    assert ids_of(tokens) == wanted
    assert 0 < stats.speculation.accepted < stats.speculation.proposed
    assert cache.trimmable < cache.length, "the ring is to have turned"


def test_a_model_that_streams_its_experts_gives_the_same_text(tiny: Path, model: Mixtral, verse: list[int]) -> None:
    wanted = ids_of(plainly(model, verse, 24))
    with streamed(tiny, 0.4) as small:
        tokens, stats = on_model(small, verse, LookupProposer(verse, 4), 24)
        assert ids_of(tokens) == wanted
        assert stats.speculation.accepted > 0
        assert stats.decode_experts is not None
        streaming = sum(layer.pool is not None for layer in small.residency.layers)
        assert stats.decode_experts.readbacks == stats.speculation.forwards * streaming


class Switching(Told):
    """Wrong at first, right from some token on."""

    def __init__(self, truth: list[int], turn: int) -> None:
        super().__init__(truth, 0.0, VOCAB)
        self._turn = turn

    def propose(self, count: int, sampler: Sampler, constraint: Any = None) -> Any:
        self._right = float(self._done >= self._turn)
        return super().propose(count, sampler, constraint)

    def guess(self) -> Guess | None:
        at = self._done
        return Guess(0, self._truth[at] if at >= self._turn and at < len(self._truth) else VOCAB)


def test_it_switches_itself_off_and_on_again() -> None:
    """A round of k costs 1 + k / 4 plain steps: right proposals pay, wrong ones do not."""
    model = chain(VOCAB, seed=3)
    truth = ids_of(plain(model, PROMPT, 400))
    proposer = Switching(truth, turn=200)
    economics = Economics(4, lambda k: 1 + k / 4, expected_acceptance=0.5, uses_clock=False)
    tokens, _ = speculated(model, PROMPT, proposer, 200, economics=economics)
    assert ids_of(tokens) == truth[:200]
    assert len(proposer.proposed) < 20
    proposer = Switching(truth, turn=200)
    economics = Economics(4, lambda k: 1 + k / 4, expected_acceptance=0.5, uses_clock=False)
    model.forwards.clear()
    tokens, stats = speculated(model, PROMPT, proposer, 400, economics=economics)
    assert ids_of(tokens) == truth
    assert stats.speculation is not None
    assert stats.speculation.accepted > 140
    assert np.mean(model.forwards[-20:-2]) == 5.0


def test_text_that_never_repeats_is_decoded_plainly() -> None:
    """A cycle through all tokens, from a prompt without a repetition, as far as one turn of it."""
    table = np.full((40, 40), -5.0)
    table[np.arange(40), (np.arange(40) + 1) % 40] = 5.0
    model = Chain(table)
    _, stats = speculated(model, [0, 1], LookupProposer([0, 1], 3), 38)
    assert stats.speculation is not None
    assert (stats.speculation.proposed, stats.speculation.forwards) == (0, 37)
    _, stats = speculated(model, [0, 1], LookupProposer([0, 1], 3), 38 + 41, economics=always(7))
    assert stats.speculation is not None
    assert stats.speculation.forwards < 37 + 41
