"""The batch as the engine thread sees it: rows of several jobs, begun, stepped and ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self

from mlx_mixtral.errors import BusyError, InvalidRequestError, MixtralError
from mlx_mixtral.runtime.batch import Batch, BatchUpdate
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.runtime.requests import Prompt, Requests, TextRequest
from mlx_mixtral.server.jobs import (
    Began,
    Ended,
    Failed,
    JobEvent,
    NewToken,
    PromptScores,
    RowSpec,
    RowUsage,
    ScoredPrompt,
    ServerJob,
)
from mlx_mixtral.server.pooling import pooled_prompts
from mlx_mixtral.server.scoring import prompt_scores
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["EngineRows"]

Post = Callable[[ServerJob, JobEvent], None]


@dataclass(eq=False)
class _Open:
    """A job that is being carried out."""

    job: ServerJob
    rows: dict[int, tuple[int, TextRequest]] = field(default_factory=dict)
    """Rows that go on, by ticket: each one's number and request."""
    usage: dict[int, RowUsage] = field(default_factory=dict)
    reading: Generator[None, None, None] | None = None
    """Of prompts that are scored or pooled, a step a chunk."""
    added_at: float = field(default_factory=time.monotonic)
    has_begun: bool = False


class EngineRows:
    """Carries out jobs on one loaded model, which is busy until ``close``. Used by the engine thread alone.

    Args:
        max_rows: generations at once.
        max_stall_s: how long a chunk of a prompt may take while rows wait for it.
        post: told each event of each job; called between steps.
    """

    def __init__(self, model: Mixtral, max_rows: int, max_stall_s: float, post: Post) -> None:
        self._model, self._post = model, post
        self._requests = Requests(model.engine, model.tokenizer)
        self._batch = Batch(model.engine, self._requests, max_rows=max_rows, max_stall_s=max_stall_s)
        self._jobs: list[_Open] = []
        self._of_ticket: dict[int, _Open] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._jobs:
            if opened.reading is not None:
                opened.reading.close()
        self._batch.close()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs and self._batch.is_idle

    @property
    def running(self) -> int:
        """Rows that are being computed."""
        return self._batch.running + sum(opened.reading is not None for opened in self._jobs)

    def add(self, job: ServerJob) -> None:
        """Begin a job; one that cannot be carried out fails by itself."""
        opened = _Open(job)
        try:
            # Rows of one prompt have one list of its tokens: it is computed once.
            for _, group in groupby(enumerate(job.rows), key=lambda pair: id(pair[1].tokens)):
                numbered = list(group)
                made = [self._request(opened, spec) for _, spec in numbered]
                tickets = self._batch.add_requests(made)
                for ticket, (index, _), request in zip(tickets, numbered, made, strict=True):
                    opened.rows[ticket] = (index, request)
                    self._of_ticket[ticket] = opened
        except MixtralError as error:
            self._drop(opened)
            self._post(job, Failed(_told(error)))
            return
        if job.scoring is not None or job.pooling is not None:
            opened.reading = self._read(opened)
        self._jobs.append(opened)

    def cancel(self, job: ServerJob) -> None:
        """End a job: its rows are free from the next step on. Unknown ones are ignored."""
        for opened in [each for each in self._jobs if each.job is job]:
            self._drop(opened)
            self._jobs.remove(opened)

    def step(self) -> None:
        """One chunk of each prompt that is scored or pooled, and what every running row got next."""
        for opened in list(self._jobs):
            if opened.reading is not None:
                self._begin(opened, time.monotonic())
                try:
                    with self._model.engine.guarded():
                        next(opened.reading)
                except StopIteration:
                    opened.reading = None
                    self._end_if_done(opened)
        for update in [] if self._batch.is_idle else self._batch.step():
            opened_row = self._of_ticket.get(update.ticket)
            if opened_row is not None:
                self._take(opened_row, update)

    def _take(self, opened: _Open, update: BatchUpdate) -> None:
        index, made = opened.rows[update.ticket]
        self._begin(opened, opened.added_at + made.request.stats.queue_s)
        if update.error is not None or update.chunk is None:
            del opened.rows[update.ticket], self._of_ticket[update.ticket]
            self._drop(opened)
            self._jobs.remove(opened)
            self._post(opened.job, Failed(_told(update.error)))
            return
        self._post(opened.job, NewToken(index, update.chunk))
        if update.chunk.finish_reason is not None:
            stats = made.request.stats
            opened.usage[index] = RowUsage(stats.prompt_tokens, stats.reused_tokens, stats.tokens)
            del opened.rows[update.ticket], self._of_ticket[update.ticket]
            self._end_if_done(opened)

    def _drop(self, opened: _Open) -> None:
        for ticket in opened.rows:
            self._batch.cancel(ticket)
            del self._of_ticket[ticket]
        opened.rows.clear()
        if opened.reading is not None:
            opened.reading.close()
            opened.reading = None

    def _end_if_done(self, opened: _Open) -> None:
        if not opened.rows and opened.reading is None:
            self._jobs.remove(opened)
            self._post(opened.job, Ended([opened.usage[index] for index in sorted(opened.usage)]))

    def _request(self, opened: _Open, spec: RowSpec) -> TextRequest:
        def begun(done: int, total: int) -> None:
            self._begin(opened, opened.added_at + made.request.stats.queue_s)

        made = self._requests.request(
            Prompt(list(spec.tokens)),
            max_tokens=spec.max_tokens,
            sampling=spec.sampling,
            stop=spec.stop,
            stop_token_ids=spec.stop_token_ids,
            is_answer=spec.is_answer,
            parser=None if spec.parser is None else spec.parser(),
            on_prefill=begun,
            adapter=spec.adapter,
        )
        if spec.constraint is None:
            return made
        state = spec.constraint.begin(made.request.max_tokens)
        return dataclasses.replace(made, request=dataclasses.replace(made.request, constraint=state))

    def _begin(self, opened: _Open, at: float) -> None:
        if not opened.has_begun:
            opened.has_begun = True
            self._post(opened.job, Began(at))

    def _read(self, opened: _Open) -> Generator[None, None, None]:
        job, context = opened.job, self._model.engine.context
        adapter = self._model.adapters.number_of(job.adapter)
        if job.scoring is not None:
            for index, prompt in enumerate(job.scoring.prompts):
                scores: PromptScores = yield from prompt_scores(context, prompt, job.scoring.top, adapter)
                self._post(job, ScoredPrompt(index, scores))
        if job.pooling is not None:
            for pooled in pooled_prompts(context, job.pooling.prompts, job.pooling.kind, adapter):
                for event in pooled:
                    self._post(job, event)
                yield


def _told(error: Exception | None) -> ApiError:
    """What a client is told of an error that ended its row and no other."""
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error))
    if isinstance(error, BusyError):
        return ApiError(503, str(error))
    said = f": {error}" if isinstance(error, MixtralError) else ""
    return ApiError(500, f"this answer could not be computed{said}", code="engine_failed")
