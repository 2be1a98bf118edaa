"""The engine's thread, driven without HTTP: jobs, work that wants the model alone, and what is posted of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.server.engine_thread import Delivery, EngineState, EngineThread
from mlx_mixtral.server.jobs import Began, Ended, Failed, JobEvent, NewToken, RowSpec, ScoredPrompt, Scoring, ServerJob
from tests.server.conftest import PATIENCE_S, wait_until


class Posted:
    """Events as they were posted, from the engine's thread."""

    def __init__(self) -> None:
        self.calls: list[list[Delivery]] = []

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        self.calls.append(list(deliveries))

    def of(self, job: ServerJob) -> list[JobEvent]:
        return [event for call in list(self.calls) for other, events in call if other is job for event in events]

    def wait_for_end(self, *jobs: ServerJob) -> None:
        for job in jobs:
            wait_until(lambda job=job: any(isinstance(e, Ended | Failed) for e in self.of(job)), "the job ends")


@pytest.fixture
def posted() -> Posted:
    return Posted()


@pytest.fixture
def engine(short: Path, posted: Posted) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: load(short), 4, posted)
    thread.start().result(PATIENCE_S)
    yield thread
    assert thread.close(PATIENCE_S)
    assert thread.state is EngineState.CLOSED


def _job(
    tokens: int, *, rows: int = 1, prompt: Sequence[int] = (1, 300, 301), scoring: Scoring | None = None
) -> ServerJob:
    own = list(prompt)
    params = SamplingParams(logit_bias={2: -100})
    return ServerJob([RowSpec(own, tokens, params) for _ in range(rows)], scoring)


def _texts(events: Sequence[JobEvent], row: int = 0) -> list[int]:
    return [event.chunk.token_id for event in events if isinstance(event, NewToken) and event.row == row]


def test_a_job_begins_gets_its_tokens_and_ends_once(engine: EngineThread, posted: Posted) -> None:
    job = _job(5, rows=2)
    engine.add(job)
    posted.wait_for_end(job)
    events = posted.of(job)
    assert isinstance(events[0], Began)
    assert [type(event) for event in events].count(Ended) == 1
    assert isinstance(events[-1], Ended)
    assert _texts(events, 0) == _texts(events, 1)
    assert len(_texts(events)) == 5
    assert [usage.tokens for usage in events[-1].usage] == [5, 5]


def test_events_of_a_step_are_one_call(engine: EngineThread, posted: Posted) -> None:
    jobs = [_job(30) for _ in range(4)]
    for job in jobs:
        engine.add(job)
    posted.wait_for_end(*jobs)
    tokens = sum(len(_texts(posted.of(job))) for job in jobs)
    assert tokens == 120
    assert len(posted.calls) < 90
    assert any(len(call) == 4 for call in posted.calls)


def test_work_that_wants_the_model_alone_waits_and_nothing_joins_before_it(
    engine: EngineThread, posted: Posted
) -> None:
    order: list[str] = []
    first = _job(60)
    engine.add(first)
    wait_until(lambda: posted.of(first), "it runs")

    def alone(model: Mixtral) -> str:
        order.append("alone" if any(isinstance(event, Ended) for event in posted.of(first)) else "too early")
        order.append("joined" if posted.of(second) else "nobody")
        return threading.current_thread().name

    second = _job(4)
    result = engine.exclusive(alone)
    engine.add(second)
    assert result.result(PATIENCE_S) == "mlx-mixtral-engine"
    posted.wait_for_end(first, second)
    assert order == ["alone", "nobody"]
    assert len(_texts(posted.of(first))) == 60


def test_an_error_of_such_work_is_its_callers_alone(engine: EngineThread, posted: Posted) -> None:
    def wrong(model: Mixtral) -> None:
        raise InvalidRequestError("no such thing")

    with pytest.raises(InvalidRequestError, match="no such thing"):
        engine.exclusive(wrong).result(PATIENCE_S)
    assert engine.failures == 0


def test_nothing_is_posted_of_a_cancelled_job(engine: EngineThread, posted: Posted) -> None:
    job, other = _job(800), _job(20)
    engine.add(job)
    wait_until(lambda: posted.of(job), "it runs")
    engine.cancel(job)
    engine.exclusive(lambda model: None).result(PATIENCE_S)
    count = len(posted.of(job))
    engine.add(other)
    posted.wait_for_end(other)
    assert len(posted.of(job)) == count < 800
    assert engine.snapshot.running_rows == 0


def test_a_job_that_cannot_be_carried_out_fails_by_itself(engine: EngineThread, posted: Posted) -> None:
    wrong, right = _job(5, prompt=[1] * 2000), _job(5)
    engine.add(wrong)
    engine.add(right)
    posted.wait_for_end(wrong, right)
    (failed,) = posted.of(wrong)
    assert isinstance(failed, Failed)
    assert failed.error.status == 400
    assert isinstance(posted.of(right)[-1], Ended)


def test_prompts_can_be_scored_without_rows(engine: EngineThread, posted: Posted) -> None:
    job = ServerJob([], Scoring([[1, 300, 301], [1]], 2))
    engine.add(job)
    posted.wait_for_end(job)
    scored = [event for event in posted.of(job) if isinstance(event, ScoredPrompt)]
    assert [event.index for event in scored] == [0, 1]
    assert scored[0].scores.logprobs[0] is None
    assert [len(likeliest) for likeliest in scored[0].scores.top] == [0, 2, 2]
    assert list(scored[1].scores.logprobs) == [None]


def test_closing_fails_what_is_open(short: Path, posted: Posted) -> None:
    thread = EngineThread(lambda: load(short), 1, posted)
    thread.start().result(PATIENCE_S)
    jobs = [_job(900), _job(900)]
    for job in jobs:
        thread.add(job)
    wait_until(lambda: posted.of(jobs[0]), "one runs")
    assert thread.close(PATIENCE_S)
    for job in jobs:
        last = posted.of(job)[-1]
        assert isinstance(last, Failed)
        assert last.error.status == 503
