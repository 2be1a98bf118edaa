"""Who comes when: short requests go ahead a few times, nobody waits longer than wished, and memory is given as rows grow."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.errors import ContextLengthError, QueueTimeoutError
from mlx_mixtral.generation.rows import BatchRow
from mlx_mixtral.generation.waiting import WaitingLine
from tests.generation.support import HandClock, StorePrefixes, WatchedScheduler, prompt_of
from tests.generation.test_scheduler_constraints import Allowed


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tickets of rows that went back into the queue, in order."""
    found: list[int] = []
    put = WaitingLine.put_back

    def recorded(line: WaitingLine, row: BatchRow) -> None:
        found.append(row.ticket)
        put(line, row)

    monkeypatch.setattr(WaitingLine, "put_back", recorded)
    return found


def _order(watched: WatchedScheduler) -> list[int]:
    """Tickets in the order of their first tokens."""
    return list(dict.fromkeys(ticket for step in watched.running for ticket in step))


def test_short_requests_overtake_a_long_one_four_times(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model, max_columns=512)
    small = watched.submit(prompt_of(small_model, 5), 40)
    large = watched.submit(prompt_of(small_model, 260, seed=1), 100)
    late = [watched.submit(prompt_of(small_model, 5, seed=seed), 3) for seed in range(2, 9)]
    watched.run()
    # The large one needs both steps of columns: others go ahead of it, then all wait until the small one is gone.
    assert _order(watched) == [small, *late[:4], large, *late[4:]]
    assert all(len(row) == 1 for row in watched.running if large in row)
    assert [len(watched.tokens[ticket]) for ticket in (small, large, *late)] == [40, 100, *[3] * 7]


def test_a_request_as_long_as_the_one_that_waits_does_not_overtake_it(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model, max_columns=512)
    small = watched.submit(prompt_of(small_model, 5), 20)
    large = watched.submit(prompt_of(small_model, 260, seed=1), 3)
    # It would fit as it begins, and may come to as many tokens.
    same = watched.submit(prompt_of(small_model, 1, seed=2), 262)
    watched.run()
    assert _order(watched) == [small, large, same]


def test_one_that_waits_too_long_ends_with_an_error_of_its_own(small_model: Mixtral) -> None:
    clock = HandClock()
    watched = WatchedScheduler(small_model, max_rows=1, clock=clock)
    first = watched.submit(prompt_of(small_model, 5), 20, timeout_s=5)
    second = watched.submit(prompt_of(small_model, 6), 3, timeout_s=5)
    third = watched.submit(prompt_of(small_model, 7), 3)
    clock.now = 4.9
    watched.step()
    assert watched.errors == {}
    clock.now = 5.0
    watched.step()
    assert list(watched.errors) == watched.ended == [second]
    assert isinstance(watched.errors[second], QueueTimeoutError)
    assert str(watched.errors[second]) == (
        "the request waited 5.0 s for its turn, as long as it was to; try again later, or give it more time"
    )
    clock.now = 1000.0
    watched.run()
    assert [len(watched.tokens[ticket]) for ticket in (first, second, third)] == [20, 0, 3]


def test_how_long_a_row_waited_is_counted(small_model: Mixtral) -> None:
    clock = HandClock()
    watched = WatchedScheduler(small_model, max_rows=1, clock=clock)
    requests = [watched.request(prompt_of(small_model, 20, seed=seed), 4) for seed in range(2)]
    for request in requests:
        watched.scheduler.submit(request)
    while not watched.scheduler.is_idle:
        watched.step()
        clock.now += 1.0
    # The first has four steps; the second begins in the step after them.
    assert [request.stats.queue_s for request in requests] == [0.0, 4.0]
    assert [request.stats.time_to_first_token_s for request in requests] == [0.0, 4.0]


def test_what_may_become_long_keeps_nobody_waiting(small_model: Mixtral) -> None:
    """Requests that ask for nearly all the memory there is run side by side while they are short."""
    watched = WatchedScheduler(small_model, max_columns=5 * 256)
    tickets = [watched.submit(prompt_of(small_model, 5, seed=seed), 1000 if seed else 3) for seed in range(3)]
    for _ in range(4):
        watched.step()
    assert set(watched.running[2]) == set(tickets)
    with pytest.raises(ContextLengthError, match=r"5 prompt tokens and up to 1600 more.*1792.*budget holds 1280"):
        watched.submit(prompt_of(small_model, 5), 1600)


@pytest.mark.parametrize("has_prefixes", [False, True])
def test_when_memory_runs_out_the_youngest_goes_back_and_comes_again(
    small_model: Mixtral, put_back: list[int], has_prefixes: bool
) -> None:
    """Its log-probabilities are those of the row alone: its answer is fed again token by token, not as a prompt."""
    sampling = SamplingParams(temperature=0.8, seed=3, logprobs=0, repetition_penalty=1.1)
    prompts = [prompt_of(small_model, length) for length in (240, 236, 200)]
    alone = []
    for prompt in prompts:
        small_model.engine.prompt_cache.clear()
        alone.append(small_model.generate(prompt, max_tokens=60, sampling=sampling, stop_token_ids=[]))
    watched = WatchedScheduler(
        small_model, max_columns=4 * 256, prefixes=StorePrefixes(10**8) if has_prefixes else None, prefill_chunk=100
    )
    tickets = [
        watched.submit(prompt, 60, temperature=0.8, seed=3, logprobs=0, repetition_penalty=1.1) for prompt in prompts
    ]
    logprobs: dict[int, list[float | None]] = {ticket: [] for ticket in tickets}
    while not watched.scheduler.is_idle:
        for update in watched.step():
            assert update.token is not None
            logprobs[update.ticket].append(update.token.logprob)
        assert watched.scheduler._running.cache.columns <= 4 * 256
    for ticket, row in zip(tickets, alone, strict=True):
        assert tuple(watched.tokens[ticket]) == row.token_ids
        assert tuple(logprobs[ticket]) == row.logprobs
    assert put_back == [tickets[2]]


def test_a_constraint_goes_on_where_its_row_was_put_back(small_model: Mixtral, put_back: list[int]) -> None:
    def constraint() -> Allowed:
        return Allowed([[token] for token in range(10, 40)], length=30)

    clock = HandClock()
    watched = WatchedScheduler(small_model, max_columns=3 * 256, clock=clock)
    first = watched.submit(prompt_of(small_model, 245), 40)
    second = watched.submit(prompt_of(small_model, 240), 60, constraint=constraint(), timeout_s=1.5)
    while not watched.scheduler.is_idle:
        watched.step()
        clock.now += 1.0
    assert watched.errors == {}, "one that has begun does not wait for its turn any more"
    assert watched.tokens[second] == list(range(10, 40))
    assert len(watched.tokens[first]) == 40
    assert put_back == [second]


def test_a_row_that_was_put_back_waits_for_all_the_room_it_may_need(
    small_model: Mixtral, put_back: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for its beginning alone it would run into the same wall again and again."""
    monkeypatch.setattr("mlx_mixtral.generation.room.STEP_TOKENS", 16)
    watched = WatchedScheduler(small_model, max_columns=4 * 256)
    long = watched.submit(prompt_of(small_model, 500), 120)
    watched.step()
    late = watched.submit(prompt_of(small_model, 230), 60)
    watched.run()
    assert put_back == [late]
    assert [len(watched.tokens[ticket]) for ticket in (long, late)] == [120, 60]


def test_a_prompt_that_is_computed_goes_back_before_a_row_that_runs(small_model: Mixtral, put_back: list[int]) -> None:
    watched = WatchedScheduler(small_model, max_columns=4 * 256, prefill_chunk=32)
    rows = [watched.submit(prompt_of(small_model, 250), 60)]
    watched.step()
    while not watched.tokens[rows[0]]:
        watched.step()
    rows.append(watched.submit(prompt_of(small_model, 700), 5))
    watched.run()
    assert put_back == [rows[1]]
    assert _order(watched) == rows
    small_model.engine.prompt_cache.clear()
    alone = small_model.generate(prompt_of(small_model, 700), max_tokens=5, stop_token_ids=[])
    assert tuple(watched.tokens[rows[1]]) == alone.token_ids


@given(
    plan=st.lists(
        st.tuples(st.sampled_from([1, 30, 230, 245, 300]), st.integers(1, 60), st.integers(0, 3), st.booleans()),
        min_size=2,
        max_size=5,
    ),
    columns=st.sampled_from([512, 768, 1024]),
    has_prefixes=st.booleans(),
)
@example(
    plan=[(245, 60, 0, False), (240, 60, 2, False), (230, 60, 1, True), (235, 60, 0, False)],
    columns=1024,
    has_prefixes=False,
)
@settings(max_examples=5, deadline=None)
def test_whatever_the_memory_rows_get_what_they_would_alone(
    small_model: Mixtral, plan: list[tuple[int, int, int, bool]], columns: int, has_prefixes: bool
) -> None:
    watched = WatchedScheduler(
        small_model, max_columns=columns, prefixes=StorePrefixes(10**6) if has_prefixes else None, prefill_chunk=64
    )
    wanted: dict[int, tuple[tuple[int, ...], bool]] = {}
    for index, (length, max_tokens, wait, leaves) in enumerate(plan):
        prompt = prompt_of(small_model, length, seed=index)
        small_model.engine.prompt_cache.clear()
        row = small_model.generate(prompt, max_tokens=max_tokens, stop_token_ids=[])
        ticket = watched.submit(prompt, max_tokens)
        wanted[ticket] = (row.token_ids, leaves)
        for _ in range(wait):
            watched.step()
            assert watched.scheduler._running.cache.columns <= columns
        if leaves:
            watched.scheduler.finish(ticket)
    watched.run()
    for ticket, (tokens, leaves) in wanted.items():
        found = tuple(watched.tokens[ticket])
        # The model's own end-of-text token ends a text, not a sequence of tokens.
        assert found[: len(tokens)] == tokens[: len(found)] if leaves else found[: len(tokens)] == tokens
