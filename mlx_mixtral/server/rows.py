"""The scheduler as the engine thread sees it: rows of several jobs, made, stepped and ended."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from mlx_mixtral.errors import InvalidRequestError, MixtralError
from mlx_mixtral.generation.scheduler import Scheduler
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.runtime.requests import Prompt, Requests, TextRequest
from mlx_mixtral.server.jobs import Began, Ended, Failed, Job, JobEvent, NewToken, PromptScores, RowUsage, Scored
from mlx_mixtral.server.scoring import prompt_scores
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["EngineRows"]

Post = Callable[[Job, JobEvent], None]


@dataclass(eq=False)
class _Open:
    """A job that is being carried out."""

    job: Job
    rows: dict[int, tuple[int, TextRequest]] = field(default_factory=dict)
    """Rows that go on, by ticket: each one's number and request."""
    usage: dict[int, RowUsage] = field(default_factory=dict)
    scoring: Generator[None, None, None] | None = None
    has_begun: bool = False


class EngineRows:
    """Carries out jobs on one loaded model. Used by the engine thread alone, within a block of ``engine.running``.

    Args:
        max_rows: generations at once.
        post: told each event of each job; called between steps.
    """

    def __init__(self, model: Mixtral, max_rows: int, post: Post) -> None:
        self._model, self._post = model, post
        self._requests = Requests(model.engine, model.tokenizer)
        self._scheduler: Scheduler = model.engine.scheduler(max_rows)
        self._jobs: list[_Open] = []
        self._of_ticket: dict[int, _Open] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs and self._scheduler.is_idle

    @property
    def running(self) -> int:
        """Rows that are being computed."""
        return self._scheduler.running + sum(opened.scoring is not None for opened in self._jobs)

    def add(self, job: Job) -> None:
        """Begin a job; one that cannot be carried out fails by itself."""
        opened = _Open(job)
        try:
            made = [self._request(opened, spec_index) for spec_index in range(len(job.rows))]
            for index, request in enumerate(made):
                ticket = self._scheduler.submit(request.request)
                opened.rows[ticket] = (index, request)
                self._of_ticket[ticket] = opened
        except MixtralError as error:
            for ticket in opened.rows:
                self._scheduler.finish(ticket)
                del self._of_ticket[ticket]
            self._post(job, Failed(ApiError(400, str(error))))
            return
        if job.scoring is not None:
            opened.scoring = self._scores(job)
        self._jobs.append(opened)

    def cancel(self, job: Job) -> None:
        """End a job: its rows are free from the next step on. Unknown ones are ignored."""
        for opened in [each for each in self._jobs if each.job is job]:
            for ticket in opened.rows:
                self._scheduler.finish(ticket)
                del self._of_ticket[ticket]
            if opened.scoring is not None:
                opened.scoring.close()
            self._jobs.remove(opened)

    def step(self) -> None:
        """One chunk of each prompt that is scored, and one token of each running row."""
        for opened in list(self._jobs):
            if opened.scoring is not None:
                try:
                    next(opened.scoring)
                except StopIteration:
                    opened.scoring = None
                    self._end_if_done(opened)
        for ticket, token in [] if self._scheduler.is_idle else self._scheduler.step():
            opened_row = self._of_ticket.get(ticket)
            if opened_row is None:
                continue
            index, made = opened_row.rows[ticket]
            chunk = made.text.chunk(token)
            self._post(opened_row.job, NewToken(index, chunk))
            if made.text.is_finished:
                self._scheduler.finish(ticket)
                stats = made.request.stats
                opened_row.usage[index] = RowUsage(stats.prompt_tokens, stats.reused_tokens, stats.tokens)
                del opened_row.rows[ticket], self._of_ticket[ticket]
                self._end_if_done(opened_row)

    def _end_if_done(self, opened: _Open) -> None:
        if not opened.rows and opened.scoring is None:
            self._jobs.remove(opened)
            self._post(opened.job, Ended([opened.usage[index] for index in sorted(opened.usage)]))

    def _request(self, opened: _Open, index: int) -> TextRequest:
        spec = opened.job.rows[index]
        if spec.constraint is not None:
            raise InvalidRequestError("structured answers wait for a scheduler that keeps constraints")
        return self._requests.request(
            Prompt(list(spec.tokens)),
            max_tokens=spec.max_tokens,
            sampling=spec.sampling,
            stop=spec.stop,
            stop_token_ids=spec.stop_token_ids,
            is_answer=spec.is_answer,
            on_prefill=lambda done, total: self._begin(opened),
        )

    def _begin(self, opened: _Open) -> None:
        if not opened.has_begun:
            opened.has_begun = True
            self._post(opened.job, Began())

    def _scores(self, job: Job) -> Generator[None, None, None]:
        assert job.scoring is not None
        for index, prompt in enumerate(job.scoring.prompts):
            scores: PromptScores = yield from prompt_scores(self._model.engine.context, prompt, job.scoring.top)
            self._post(job, Scored(index, scores))
