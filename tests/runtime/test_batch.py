"""Batches of texts: generations that come and go, each with its own options, and what becomes of those that are cut."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mlx_mixtral import Mixtral, PromptLookup, SamplingParams
from mlx_mixtral.errors import BusyError, ClosedError, ContextLengthError, InvalidRequestError
from mlx_mixtral.runtime.batch import Batch, BatchUpdate

PROMPTS = ["Once upon a time", "def add(a, b):", "3 + 4 ="]


def _run(batch: Batch) -> dict[int, list[BatchUpdate]]:
    found: dict[int, list[BatchUpdate]] = {}
    while not batch.is_idle:
        for update in batch.step():
            found.setdefault(update.ticket, []).append(update)
    return found


def _text(updates: list[BatchUpdate]) -> str:
    return "".join(update.chunk.text for update in updates if update.chunk is not None)


def test_generations_come_and_go(short_model: Mixtral) -> None:
    options: list[dict[str, Any]] = [
        {"max_tokens": 12},
        {"max_tokens": 9, "sampling": SamplingParams(temperature=0.7, seed=3)},
        {"max_tokens": 20, "stop": ["e", "\n"]},
    ]
    alone = [short_model.generate(prompt, **own) for prompt, own in zip(PROMPTS, options, strict=True)]
    with short_model.batch(max_rows=2) as batch:
        assert batch.is_idle
        tickets = batch.add(PROMPTS[0], **options[0])
        found = {tickets[0]: batch.step()}
        for prompt, own in zip(PROMPTS[1:], options[1:], strict=True):
            tickets += batch.add(prompt, **own)
        assert (batch.running, batch.waiting) == (1, 2)
        with pytest.raises(BusyError):
            short_model.generate("x")
        for ticket, updates in _run(batch).items():
            found.setdefault(ticket, []).extend(updates)
    for ticket, row in zip(tickets, alone, strict=True):
        assert _text(found[ticket]) == row.text
        reasons = [update.chunk.finish_reason for update in found[ticket] if update.chunk is not None]
        assert reasons == [None] * (len(row.token_ids) - 1) + [row.finish_reason]
    assert short_model.generate(PROMPTS[0], **options[0]).text == alone[0].text


def test_samples_of_one_prompt_have_seeds_one_after_the_other(short_model: Mixtral) -> None:
    sampling = SamplingParams(temperature=1.0, seed=7)
    alone = [
        short_model.generate(prompt, max_tokens=10, sampling=SamplingParams(temperature=1.0, seed=7 + i))
        for prompt in PROMPTS[:2]
        for i in range(3)
    ]
    found = short_model.generate_batch(PROMPTS[:2], n=3, max_tokens=10, sampling=sampling)
    assert [row.token_ids for row in found] == [row.token_ids for row in alone]
    assert len({row.token_ids for row in found}) > 4
    with short_model.batch() as batch:
        tickets = batch.add(PROMPTS[0], n=3, max_tokens=10, sampling=sampling)
        updates = _run(batch)
    assert [_text(updates[ticket]) for ticket in tickets] == [row.text for row in alone[:3]]
    unseeded = short_model.generate_batch(
        PROMPTS[:1], n=4, max_tokens=10, sampling=SamplingParams(temperature=2.0), stop_token_ids=[]
    )
    assert len({row.token_ids for row in unseeded}) > 1


def test_a_seed_in_a_batch_of_eight_is_the_seed_alone(short_model: Mixtral) -> None:
    each = [
        {"sampling": SamplingParams(temperature=0.5 + index / 4, seed=index, top_k=40 * (index % 2), logprobs=0)}
        for index in range(8)
    ]
    prompts = [f"{PROMPTS[index % 3]} {'x ' * index}" for index in range(8)]
    found = short_model.generate_batch(prompts, each=each, max_tokens=8)
    for prompt, own, row in zip(prompts, each, found, strict=True):
        short_model.engine.prompt_cache.clear()
        alone = short_model.generate(prompt, max_tokens=8, **own)
        assert (row.token_ids, row.logprobs) == (alone.token_ids, alone.logprobs)


def test_each_prompt_may_have_options_of_its_own(short_model: Mixtral) -> None:
    told: list[tuple[int, int]] = []
    each: list[Any] = [{"max_tokens": 3}, {}, {"stop": "e", "on_prefill": lambda *at: told.append(at)}]
    found = short_model.generate_batch(PROMPTS, each=each, max_tokens=6)
    alone = [short_model.generate(prompt, **{"max_tokens": 6} | own) for prompt, own in zip(PROMPTS, each, strict=True)]
    assert [(row.text, row.finish_reason) for row in found] == [(row.text, row.finish_reason) for row in alone]
    assert told[-1][0] == told[-1][1] == found[2].stats.prompt_tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"each": [{}]}, "each has 1 dicts for 3 prompts; give one for each, or leave it out"),
        ({"each": "abc"}, "each is 'abc', of type str; it must be a list of options"),
        ({"each": [{}, 3, {}]}, "prompt 1: each is 3, of type int; it must be a dict of options"),
        ({"each": [{}, {}, {"max_tokens": 0}]}, "prompt 2: max_tokens is 0"),
        (
            {"each": [{"temperature": 1}, {}, {}]},
            "prompt 0: each holds 'temperature'; options of a prompt are max_tokens",
        ),
        ({"n": 0}, "n is 0; it must be an integer from 1 to 128"),
        ({"n": 10**9}, "n is 1000000000"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
    ids=str,
)
def test_wrong_options_of_a_batch(short_model: Mixtral, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        short_model.generate_batch(PROMPTS, **options)
    with short_model.batch() as batch:
        assert batch.is_idle, "the model is free"


def test_a_text_that_ends_early_leaves_before_the_next_step(short_model: Mixtral) -> None:
    with short_model.batch() as batch:
        batch.add(PROMPTS[0], max_tokens=100, stop=["e", "a", "o", " "])
        while not any(update.chunk is not None and update.chunk.finish_reason for update in batch.step()):
            assert not batch.is_idle
        assert batch.step() == []
        assert (batch.is_idle, batch.running) == (True, 0)


def test_what_is_cancelled_says_nothing_more(short_model: Mixtral) -> None:
    alone = short_model.generate(PROMPTS[0], max_tokens=12)
    with short_model.batch(max_rows=2) as batch:
        staying, running, waiting = (batch.add(prompt, max_tokens=12)[0] for prompt in PROMPTS)
        batch.step()
        batch.cancel(running)
        batch.cancel(waiting)
        batch.cancel(12345)
        batch.step()
        assert (batch.running, batch.waiting) == (1, 0)
        found = _run(batch)
    assert set(found) == {staying}
    assert alone.text.endswith(_text(found[staying]))


def test_an_error_of_a_callback_ends_its_own_generation(short_model: Mixtral) -> None:
    alone = short_model.generate(PROMPTS[1], max_tokens=8)
    calls: list[int] = []

    def cancelled() -> bool:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("mine")
        return False

    with short_model.batch() as batch:
        (wrong,) = batch.add(PROMPTS[0], max_tokens=8, cancelled=cancelled)
        (right,) = batch.add(PROMPTS[1], max_tokens=8)
        found = _run(batch)
    assert isinstance(found[wrong][-1].error, KeyError)
    assert [update.chunk is None for update in found[wrong]] == [False, False, True]
    assert _text(found[right]) == alone.text
    calls.clear()
    with pytest.raises(KeyError):
        short_model.generate_batch(PROMPTS, max_tokens=8, cancelled=cancelled)
    assert short_model.generate(PROMPTS[1], max_tokens=8).text == alone.text


def test_earlier_turns_are_used_again(short_model: Mixtral) -> None:
    prompt = "Once upon a time there was a king who had three sons and a very large kingdom by the sea"
    short_model.engine.prompt_cache.clear()
    first = short_model.generate_batch([prompt, PROMPTS[1]], max_tokens=8)[0]
    again = short_model.generate(prompt, max_tokens=8)
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 2
    third = short_model.generate_batch([prompt], max_tokens=8)[0]
    assert third.stats.reused_tokens == again.stats.reused_tokens
    assert first.token_ids == again.token_ids == third.token_ids


def test_a_closed_batch_says_so_and_frees_the_model(short_model: Mixtral) -> None:
    batch = short_model.batch()
    batch.add(PROMPTS[0], max_tokens=30)
    batch.step()
    batch.close()
    batch.close()
    for call in (batch.step, lambda: batch.add(PROMPTS[0])):
        with pytest.raises(ClosedError, match="this batch was closed"):
            call()
    assert batch.is_idle
    batch.cancel(1)
    assert short_model.generate(PROMPTS[0], max_tokens=2).token_ids


def test_a_batch_that_is_dropped_frees_the_model_at_once(short_model: Mixtral) -> None:
    batch = short_model.batch()
    batch.add(PROMPTS[0], max_tokens=30)
    batch.step()
    del batch
    with short_model.engine.exclusive():
        pass


def test_a_step_may_close_its_own_batch(short_model: Mixtral) -> None:
    batch = short_model.batch()

    def cancelled() -> bool:
        batch.close()
        return False

    batch.add(PROMPTS[0], max_tokens=30, cancelled=cancelled)
    assert len(batch.step()) == 1
    with short_model.engine.exclusive():
        pass


def test_another_thread_may_close_it(short_model: Mixtral) -> None:
    batch, inside, let_go = short_model.batch(), threading.Event(), threading.Event()

    def waits() -> bool:
        inside.set()
        assert let_go.wait(20)
        return False

    batch.add(PROMPTS[0], max_tokens=30, cancelled=waits)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(batch.step()))
    reader.start()
    assert inside.wait(20)
    closer = threading.Thread(target=batch.close)
    closer.start()
    let_go.set()
    for thread in (reader, closer):
        thread.join(20)
    # The step under way still gives its token.
    assert len(found) == 1
    assert batch.is_idle


def test_requests_that_cannot_be_are_refused_and_nothing_is_added(short_model: Mixtral) -> None:
    with short_model.batch() as batch:
        with pytest.raises(ContextLengthError):
            batch.add([1] * short_model.config.max_position_embeddings)
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            batch.add("")
        with pytest.raises(InvalidRequestError, match="speculation is for one text"):
            batch.add("x", speculation=PromptLookup())
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"timeout_s": 0}, "timeout_s is 0; it must be a number of seconds above 0"),
            ({"timeout_s": "x"}, "timeout_s is 'x'"),
            ({"n": 0}, "n is 0"),
            ({"temperature": 1}, "add: there is no argument 'temperature'; give it as sampling=SamplingParams"),
        ]
        for options, said in wrong:
            with pytest.raises(InvalidRequestError, match=said):
                batch.add("x", **options)
        assert batch.is_idle
