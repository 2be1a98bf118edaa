"""Batches: every row gets what it would get alone, whoever joins and leaves beside it, within the rows and cache allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.errors import BusyError, ContextLengthError, InvalidRequestError
from mlx_mixtral.model.step import DecodeStep
from tests.generation.support import WatchedScheduler

RECORDED = Path(__file__).parents[1] / "goldens" / "transformers"
LENGTHS = (3, 40, 7, 150, 11, 2, 90, 5)


@pytest.fixture(scope="module")
def tiny(small: Path) -> Path:
    return small


@pytest.fixture(scope="module")
def model(small_model: Mixtral) -> Mixtral:
    return small_model


@pytest.fixture(scope="module", params=["tiny", "sliding_window", "one_expert"])
def each(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Mixtral]:
    with load(tiny if request.param == "tiny" else RECORDED / request.param) as loaded:
        yield loaded


def _prompt(model: Mixtral, length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed + length).integers(3, model.config.vocab_size, length)]


def _alone(model: Mixtral, prompt: Sequence[int], **options: Any) -> tuple[int, ...]:
    return model.generate(prompt, **options).token_ids


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_rows_equal_rows_alone(each: Mixtral, max_rows: int) -> None:
    """To the bit: log-probabilities are compared as they are."""
    sampling = SamplingParams(logprobs=0)
    prompts = [_prompt(each, length) for length in LENGTHS if length + 12 < each.config.max_position_embeddings]
    together = each.generate_batch(prompts, max_tokens=12, max_rows=max_rows, sampling=sampling)
    each.engine.prompt_cache.clear()
    for prompt, row in zip(prompts, together, strict=True):
        alone = each.generate(prompt, max_tokens=12, sampling=sampling)
        each.engine.prompt_cache.clear()
        assert (row.token_ids, row.logprobs) == (alone.token_ids, alone.logprobs)
        assert row.stats.prompt_tokens == len(prompt)
        assert row.finish_reason in ("length", "stop")


def test_seeded_rows_draw_as_if_alone(model: Mixtral) -> None:
    prompts = [_prompt(model, length) for length in (4, 9, 30)]
    sampling = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=5, logprobs=2)
    together = model.generate_batch(prompts, max_tokens=10, sampling=sampling)
    model.engine.prompt_cache.clear()
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt, max_tokens=10, sampling=sampling)
        assert (row.token_ids, row.logprobs) == (alone.token_ids, alone.logprobs)


def test_text_stops_and_streams_like_rows_alone(short_model: Mixtral) -> None:
    prompts = ["Once upon a time", "def add(a, b):", "3 + 4 ="]
    alone = [short_model.generate(prompt, max_tokens=20, stop=["e", "\n"]) for prompt in prompts]
    texts = ["", "", ""]
    reasons: list[str | None] = [None, None, None]
    for index, chunk in short_model.stream_batch(prompts, max_tokens=20, stop=["e", "\n"]):
        assert reasons[index] is None, "nothing comes after the end of a row"
        texts[index] += chunk.text
        reasons[index] = chunk.finish_reason
    assert texts == [row.text for row in alone]
    assert reasons == [row.finish_reason for row in alone]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_streamed_experts_give_the_same_rows(tiny: Path, model: Mixtral, share: float) -> None:
    prompts = [_prompt(model, length) for length in (4, 30, 9)]
    wanted = [row.token_ids for row in model.generate_batch(prompts, max_tokens=8)]
    least = model.min_memory_bytes
    with load(tiny, memory=int(least + share * model.nbytes)) as streamed:
        assert [row.token_ids for row in streamed.generate_batch(prompts, max_tokens=8)] == wanted


def test_closing_a_batch_leaves_the_model_usable(model: Mixtral) -> None:
    wanted = _alone(model, [1, 2, 3], max_tokens=5)
    chunks = model.stream_batch([[1, 2, 3], [4, 5]], max_tokens=50)
    next(chunks)
    with pytest.raises(BusyError):
        model.generate([1, 2, 3])
    chunks.close()
    assert _alone(model, [1, 2, 3], max_tokens=5) == wanted


def test_bad_batches_name_the_prompt(short_model: Mixtral) -> None:
    assert short_model.generate_batch([]) == []
    limit = short_model.config.max_position_embeddings
    with pytest.raises(ContextLengthError, match=rf"prompt 1: the prompt has {limit} tokens"):
        short_model.generate_batch([[1], [1] * limit])
    with pytest.raises(InvalidRequestError, match=r"prompt 2: the prompt is empty"):
        short_model.generate_batch(["a", [1], ""])
    with pytest.raises(InvalidRequestError, match=r"prompts is 'text', of type str"):
        short_model.generate_batch("text")
    with pytest.raises(InvalidRequestError, match="max_rows is 0"):
        short_model.generate_batch(["a"], max_rows=0)


@given(
    plan=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=7),
    max_rows=st.integers(1, 4),
    leaves=st.sets(st.integers(0, 6), max_size=2),
)
@example(plan=[(1, 1, 0)], max_rows=1, leaves={0})
@settings(max_examples=12, deadline=None)
def test_whoever_joins_and_leaves(
    model: Mixtral, plan: list[tuple[int, int, int]], max_rows: int, leaves: set[int]
) -> None:
    watched, wanted = WatchedScheduler(model, max_rows=max_rows, prefill_chunk=32), dict[int, tuple[int, ...]]()
    for index, (length, max_tokens, wait) in enumerate(plan):
        prompt = _prompt(model, length, seed=index)
        ticket = watched.submit(prompt, max_tokens)
        wanted[ticket] = _alone(model, prompt, max_tokens=max_tokens, stop_token_ids=[])
        for _ in range(wait):
            watched.step()
        if index in leaves:
            watched.scheduler.finish(ticket)
            wanted[ticket] = wanted[ticket][: len(watched.tokens[ticket])]
    watched.run()
    # Nobody ran at all when all left at once.
    assert all(len(rows) <= max_rows for rows in watched.running)
    for ticket, tokens in wanted.items():
        # The model's own end-of-text token ends a text, not a sequence of tokens.
        assert tuple(watched.tokens[ticket][: len(tokens)]) == tokens


def test_no_step_is_computed_for_rows_that_have_all_they_asked_for(model: Mixtral) -> None:
    computed: list[int] = []
    step = DecodeStep(model.module, compiled=False)

    def counted(tokens: mx.array, cache: Any) -> mx.array:
        computed.append(tokens.shape[0])
        return step(tokens, cache)

    watched = WatchedScheduler(model, step=counted)
    for max_tokens in (1, 2, 4):
        watched.submit(_prompt(model, 6, seed=max_tokens), max_tokens)
    watched.run()
    assert computed == [2, 1, 1]


def test_under_a_budget_there_are_no_more_rows_than_asked_for(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model, max_rows=2, max_columns=10 * 256)
    for index in range(4):
        watched.submit(_prompt(small_model, 5, seed=index), 4)
    watched.run()
    assert max(map(len, watched.running)) == 2


@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ((10, 74), 2),  # 64 tokens of padding are allowed
        ((10, 75), 1),  # 65 are not
        ((300, 364), 2),
        ((400, 300), 1),
        ((1, 1), 2),
        ((1, 2), 1),  # a single token would be rounded as a decode step is
        ((10, 74, 74), 3),
        ((10, 10, 80), 2),  # a pair goes, the third would pad both
    ],
    ids=str,
)
def test_prompts_are_computed_together_while_padding_stays_small(
    model: Mixtral, lengths: tuple[int, ...], together: int
) -> None:
    watched = WatchedScheduler(model)
    for index, length in enumerate(lengths):
        watched.submit(_prompt(model, length, seed=index), 2)
    admitted = watched.scheduler._next_job()
    assert admitted is not None
    assert len(admitted.rows) == together


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"logit_bias": {7: 50.0}},
        {"presence_penalty": -50.0},
        {"frequency_penalty": -50.0},
        {"repetition_penalty": 0.01},
    ],
    ids=str,
)
def test_greedy_rows_that_ask_for_one_thing_more_get_it(model: Mixtral, params: dict[str, Any]) -> None:
    """Beside a row that asks for nothing, with which they must not share a kernel."""
    prompts = [_prompt(model, 6), _prompt(model, 7)]
    sampling = SamplingParams(**params)
    alone = model.generate(prompts[1], max_tokens=12, sampling=sampling, stop_token_ids=[])
    watched = WatchedScheduler(model)
    watched.submit(prompts[0], 12)
    ticket = watched.submit(prompts[1], 12, **params)
    watched.run()
    assert tuple(watched.tokens[ticket]) == alone.token_ids
    if "logprobs" not in params:
        assert alone.token_ids != _alone(model, prompts[1], max_tokens=12, stop_token_ids=[])
    else:
        found = model.generate_batch(prompts, max_tokens=3, sampling=sampling)
        assert all(row.logprobs is not None for row in found)
