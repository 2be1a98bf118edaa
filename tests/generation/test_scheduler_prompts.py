"""Prompts of a batch: in chunks by time, left where nobody wants them, and computed once for several rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.generation.prompts import FIRST_CHUNK_TOKENS, MIN_CHUNK_TOKENS, ChunkPace
from tests.generation.support import HandClock, WatchedScheduler, prompt_of


class _Chunks:
    """The tokens of every chunk that a model computes, in all rows; each takes its time on ``clock``."""

    def __init__(
        self, model: Mixtral, monkeypatch: pytest.MonkeyPatch, clock: HandClock | None = None, rate: float = 1.0
    ) -> None:
        self.sizes: list[int] = []
        self.rate = rate
        module = type(model.module)
        for name in ("remember", "hidden"):
            compute = getattr(module, name)

            def counted(own: Any, tokens: mx.array, *args: Any, compute: Any = compute, **options: Any) -> Any:
                self.sizes.append(tokens.size)
                if clock is not None:
                    clock.now += tokens.size / self.rate
                return compute(own, tokens, *args, **options)

            monkeypatch.setattr(module, name, counted)


def test_a_prompt_that_all_left_is_computed_no_further(small_model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = _Chunks(small_model, monkeypatch)
    watched = WatchedScheduler(small_model, prefill_chunk=64)
    leaving = [watched.submit(prompt_of(small_model, 400, seed=seed), 5) for seed in (0, 1)]
    watched.step()
    assert chunks.sizes == [64]  # 32 of each row
    watched.scheduler.finish(leaving[0])
    watched.step()
    assert chunks.sizes == [64, 64]
    watched.scheduler.finish(leaving[1])
    watched.step()
    assert watched.scheduler.is_idle
    assert chunks.sizes == [64, 64]


def test_a_row_that_leaves_a_prompt_leaves_the_others_bits(small_model: Mixtral) -> None:
    """Wherever it is ended: its neighbours have the log-probabilities they have alone."""
    lengths = {"first": 5, "leaving": 90, "staying": 100}
    sampling = SamplingParams(logprobs=0)
    alone = {}
    for name, length in lengths.items():
        small_model.engine.prompt_cache.clear()
        alone[name] = small_model.generate(prompt_of(small_model, length), max_tokens=9, sampling=sampling)
    for steps in range(6):
        watched = WatchedScheduler(small_model, prefill_chunk=64)
        tickets = {"first": watched.submit(prompt_of(small_model, 5), 9, logprobs=0)}
        watched.step()
        tickets |= {
            name: watched.submit(prompt_of(small_model, lengths[name]), 9, logprobs=0)
            for name in ("leaving", "staying")
        }
        found: dict[int, list[float | None]] = {}

        def step(watched: WatchedScheduler = watched, found: dict[int, list[float | None]] = found) -> None:
            for update in watched.step():
                if update.token is not None:
                    found.setdefault(update.ticket, []).append(update.token.logprob)

        for _ in range(steps):
            step()
        watched.scheduler.finish(tickets["leaving"])
        made = len(watched.tokens[tickets["leaving"]])
        step()
        assert watched.scheduler.running == 2, "it is gone after one step"
        while not watched.scheduler.is_idle:
            step()
        assert len(watched.tokens[tickets["leaving"]]) == made
        assert tuple(watched.tokens[tickets["first"]]) == alone["first"].token_ids
        assert tuple(watched.tokens[tickets["staying"]]) == alone["staying"].token_ids
        assert tuple(found[tickets["staying"]]) == alone["staying"].logprobs
        assert tuple(found[tickets["first"]]) == (alone["first"].logprobs or ())[1:]


def test_what_is_ended_while_it_waits_is_never_computed(small_model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = _Chunks(small_model, monkeypatch)
    watched = WatchedScheduler(small_model, max_rows=1)
    first, waiting = watched.submit(prompt_of(small_model, 5), 3), watched.submit(prompt_of(small_model, 6), 3)
    watched.step()
    assert (watched.scheduler.running, watched.scheduler.waiting) == (1, 1)
    watched.scheduler.finish(waiting)
    watched.run()
    assert chunks.sizes == [5]
    assert [len(watched.tokens[ticket]) for ticket in (first, waiting)] == [3, 0]


def test_a_callback_that_raises_ends_only_its_row(small_model: Mixtral) -> None:
    told: list[tuple[int, int]] = []

    def fail(done: int, total: int) -> None:
        raise RuntimeError("enough")

    watched = WatchedScheduler(small_model, prefill_chunk=64)
    wrong = watched.submit(prompt_of(small_model, 90), 4, on_prefill=fail)
    other = watched.submit(prompt_of(small_model, 100), 4, on_prefill=lambda *at: told.append(at))
    watched.run()
    assert str(watched.errors.pop(wrong)) == "enough"
    assert watched.errors == {}
    assert (watched.tokens[wrong], len(watched.tokens[other])) == ([], 4)
    assert told == [(32, 100), (64, 100), (100, 100)] or told == [(32, 100), (64, 100), (88, 100), (100, 100)]


# Chunks by time


def test_chunks_take_the_time_that_rows_may_wait(small_model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    chunks = _Chunks(small_model, monkeypatch, clock, rate=400.0)
    watched = WatchedScheduler(small_model, clock=clock, max_stall_s=0.25)
    running = watched.submit(prompt_of(small_model, 5), 60)
    watched.step()
    chunks.sizes.clear()
    long = watched.submit(prompt_of(small_model, 600), 3)
    gaps = []
    while not watched.tokens[long]:
        before = clock.now
        watched.step()
        gaps.append(clock.now - before)
    # Nothing is known of the rate at first; then 0.6 of 0.25 s at 400 tokens/s are 60 tokens.
    first, *others, last = chunks.sizes
    assert (first, sum(chunks.sizes), len(chunks.sizes)) == (FIRST_CHUNK_TOKENS, 600, 11)
    assert set(others) <= {59, 60}
    assert last < 60
    assert max(gaps) <= 0.25
    # A token for the running row in each of these steps: neither waits for the other. The long prompt joins in a step of its
    # own.
    assert len(watched.tokens[running]) == 1 + len(gaps) == 13
    watched.run()
    assert len(watched.tokens[running]) == 60


def test_a_slow_machine_computes_some_tokens_of_a_prompt_in_every_step() -> None:
    clock = HandClock()
    pace = ChunkPace(0.25, 1024, is_whole=False, clock=clock)

    def slow(tokens: int, seconds: float) -> int:
        clock.now += seconds
        return tokens

    assert pace.tokens(is_waited_for=False) == 1024
    assert pace.tokens(is_waited_for=True) == FIRST_CHUNK_TOKENS
    pace.timed(lambda: slow(32, 16.0))
    assert pace.tokens(is_waited_for=True) == MIN_CHUNK_TOKENS
    for _ in range(20):
        pace.timed(lambda: slow(1000, 1.0))
    assert pace.tokens(is_waited_for=True) == 149  # what was measured first counts less and less
    for _ in range(40):
        pace.timed(lambda: slow(10**6, 1.0))
    assert pace.tokens(is_waited_for=True) == 1024
    # Where every chunk reads experts, short ones would read them over and over.
    assert ChunkPace(0.25, 1024, is_whole=True, clock=clock).tokens(is_waited_for=True) == 1024


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}], ids=str)
def test_bits_do_not_depend_on_chunks(small: Path, options: dict[str, Any]) -> None:
    """Nor on who is computed beside it; attention to few bits is another one for up to 16 tokens, and no chunk is as short."""
    with load(small, prefix_cache=0, **options) as model:
        sampling = SamplingParams(logprobs=0)
        prompts = [prompt_of(model, length) for length in (203, 160)]
        alone = [model.generate(prompt, max_tokens=6, sampling=sampling) for prompt in prompts]
        for chunk in (1, 2, 3, 32, 100, 101, 202, 400):
            watched = WatchedScheduler(model, prefill_chunk=chunk)
            tickets = [watched.submit(prompt, 6, logprobs=0) for prompt in prompts]
            logprobs: dict[int, list[float | None]] = {}
            while not watched.scheduler.is_idle:
                for update in watched.step():
                    assert update.token is not None
                    logprobs.setdefault(update.ticket, []).append(update.token.logprob)
            for ticket, row in zip(tickets, alone, strict=True):
                assert (tuple(watched.tokens[ticket]), tuple(logprobs[ticket])) == (row.token_ids, row.logprobs)


def test_a_much_shorter_prompt_goes_ahead_of_one_that_is_computed(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model, prefill_chunk=32)
    long = watched.submit(prompt_of(small_model, 900), 2)
    watched.step()
    similar = watched.submit(prompt_of(small_model, 400), 2)
    watched.step()
    short = [watched.submit(prompt_of(small_model, 10, seed=seed), 2) for seed in range(6)]
    watched.run()
    order = [ticket for step in watched.running for ticket in step]
    ahead = order[: order.index(long)]
    # Six are one prompt to the scheduler: they are computed together.
    assert set(ahead) == set(short)
    assert order.index(long) < order.index(similar)


def test_it_does_so_four_times_at_most(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model, prefill_chunk=32)
    long = watched.submit(prompt_of(small_model, 900), 2)
    watched.step()
    short = []
    for seed in range(6):
        short.append(watched.submit(prompt_of(small_model, 10, seed=seed), 1))
        watched.step()
    assert [len(watched.tokens[ticket]) for ticket in short] == [1, 1, 1, 1, 0, 0]
    watched.run()
    order = [ticket for step in watched.running for ticket in step]
    assert order.index(short[3]) < order.index(long) < order.index(short[4])


# Several rows of one prompt


@pytest.mark.parametrize("max_rows", [8, 2, 1])
def test_rows_of_one_prompt_share_its_computation(
    small_model: Mixtral, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    prompt = prompt_of(small_model, 50)
    alone = [
        small_model.generate(
            prompt, max_tokens=8, sampling=SamplingParams(temperature=1.0, seed=seed, logprobs=0), stop_token_ids=[]
        )
        for seed in range(3)
    ]
    chunks = _Chunks(small_model, monkeypatch)
    watched = WatchedScheduler(small_model, max_rows=max_rows)
    other = watched.submit(prompt_of(small_model, 200), 12)
    requests = [watched.request(prompt, 8, temperature=1.0, seed=seed, logprobs=0) for seed in range(3)]
    tickets = watched.scheduler.submit_group(requests)
    assert watched.scheduler.waiting == 4
    watched.run()
    assert [tuple(watched.tokens[ticket]) for ticket in tickets] == [row.token_ids for row in alone]
    assert len({row.token_ids for row in alone}) > 1
    assert sum(chunks.sizes) == 250
    assert max(map(len, watched.running)) <= max_rows
    assert len(watched.tokens[other]) == 12
    assert [request.stats.reused_tokens for request in requests] == [0, 50, 50]


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("ended", [0, 1])
def test_one_of_them_that_is_ended_leaves_the_rest(small_model: Mixtral, steps: int, ended: int) -> None:
    prompt = prompt_of(small_model, 90)
    alone = small_model.generate(prompt, max_tokens=5, stop_token_ids=[])
    watched = WatchedScheduler(small_model, prefill_chunk=32, max_rows=2)
    tickets = watched.scheduler.submit_group([watched.request(prompt, 5) for _ in range(3)])
    for _ in range(steps):
        watched.step()
    watched.scheduler.finish(tickets[ended])
    made = len(watched.tokens.get(tickets[ended], []))
    watched.run()
    assert len(watched.tokens.get(tickets[ended], [])) == made
    for ticket in tickets:
        if ticket != tickets[ended]:
            assert tuple(watched.tokens[ticket]) == alone.token_ids


def test_a_slow_chunk_counts_at_once_and_a_fast_one_by_and_by() -> None:
    """Chunks of a second at 1,000 tokens a second: at 250 all that is over counts, back at 1,000 half of it; 0.6 is used."""
    clock = HandClock()
    pace = ChunkPace(1.0, 10_000, is_whole=False, clock=clock)

    def chunk(tokens: int, seconds: float) -> int:
        def compute() -> int:
            clock.now += seconds
            return tokens

        pace.timed(compute)
        return pace.tokens(is_waited_for=True)

    assert [chunk(1000, 1.0), chunk(1000, 4.0), chunk(1000, 1.0)] == [600, 150, 375]
