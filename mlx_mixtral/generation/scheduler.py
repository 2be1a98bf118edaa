"""Several generations at once: they join and leave between steps, each ends on its own, and one forward serves them all.

A step of a batch reads the weights once for all its rows, and each expert once for all rows that chose it. What a row gets is
what it would get alone: who runs beside it, how its prompt was cut into chunks, and whether it was put back into the queue and
came again change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mixtral.errors import MixtralError, QueueTimeoutError
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.prompts import ChunkPace, PromptJob, taken
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.room import Room
from mlx_mixtral.generation.rows import BatchRow, Prefixes, RowUpdate, SharedPrompt
from mlx_mixtral.generation.running import RunningRows
from mlx_mixtral.generation.waiting import MAX_OVERTAKEN, WaitingLine

__all__ = ["DEFAULT_MAX_STALL_S", "Scheduler"]

DEFAULT_MAX_STALL_S = 0.25
# A prompt is set aside for one of less than this share of what is left of it.
SHORT_SHARE = 0.25


class Scheduler:
    """Carries out requests on one model. Use it from one thread at a time, and nothing else of the model meanwhile.

    Requests wait in one queue. A short one goes ahead of one that needs more room than there is, or whose prompt is being
    computed, up to ``MAX_OVERTAKEN`` times. Room is given as rows grow: one that may become long keeps nobody waiting before it
    is. When there is none left, the row that was admitted last goes back into the queue; when its turn comes again its prompt
    is computed and the tokens it made are fed again, one a step, so that its numbers stay what they were.

    Args:
        max_rows: generations at once.
        max_columns: rows times columns of cache, as a memory budget allows; None for no limit.
        max_stall_s: how long a chunk of a prompt may take while rows wait for it.
        prefixes: what earlier prompts left, and what these leave; None to keep nothing.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        context: DecodeContext,
        *,
        max_rows: int,
        max_columns: int | None = None,
        max_stall_s: float = DEFAULT_MAX_STALL_S,
        prefixes: Prefixes | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._context, self._model = context, context.model
        self._clock, self._prefixes = clock, prefixes
        self._room = Room(self._model, max_rows, max_columns, prefixes)
        self._pace = ChunkPace(max_stall_s, context.chunk_tokens, is_whole=self._model.is_streamed, clock=clock)
        self._line = WaitingLine()
        self._jobs: list[PromptJob] = []
        self._running = RunningRows(context)
        self._tickets = self._admitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._line and not self._running.rows and not self._jobs

    @property
    def running(self) -> int:
        """Rows that are being generated or whose prompts are being computed."""
        return len(self._running.rows) + sum(not row.is_finished for job in self._jobs for row in job.rows)

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return sum(1 + len(row.siblings) for row in self._line)

    def submit(self, request: Request, *, timeout_s: float | None = None) -> int:
        """Put a request at the end of the queue; returns its ticket. As ``submit_group`` for one."""
        return self.submit_group([request], timeout_s=timeout_s)[0]

    def submit_group(self, requests: Sequence[Request], *, timeout_s: float | None = None) -> list[int]:
        """Put requests that continue one prompt at the end of the queue; returns their tickets. It is computed once.

        Args:
            timeout_s: how long they may wait until the prompt is begun; None for ever.

        Raises:
            ContextLengthError: one would not fit even alone.
        """
        assert all(request.tokens == requests[0].tokens for request in requests)
        for request in requests:
            self._room.check(request)
        deadline_s = None if timeout_s is None else self._clock() + timeout_s
        rows = []
        for request in requests:
            self._tickets += 1
            meter = Meter(self._model, request, clock=self._clock)
            rows.append(BatchRow(self._tickets, request, meter, deadline_s, is_alone=self._room.is_alone(request)))
        rows[0].siblings = rows[1:]
        self._line.add(rows[0])
        return [row.ticket for row in rows]

    def finish(self, ticket: int) -> None:
        """End a generation before its last token: it leaves before the next step. Unknown tickets are ignored.

        Wherever it is: in the queue, in a prompt that is computed, or running. What it has in the cache is kept for prompts
        that begin alike.
        """
        computing = [row for job in self._jobs for row in job.rows]
        for row in [*self._line, *computing, *self._running.rows]:
            for member in (row, *row.siblings):
                if member.ticket == ticket:
                    member.is_finished = True

    def step(self) -> list[RowUpdate]:
        """A token of every running row; rows that got their last one are gone, and those that ended with an error.

        While nothing runs yet it computes a chunk of a prompt and gives nothing. What cannot be computed ends the rows it was
        for: an expert that cannot be read all rows of that step, what a request's own functions raise that row.
        """
        updates: list[RowUpdate] = []
        running = self._running
        with mx.stream(self._context.stream):
            self._leave(updates)
            self._catch_up(updates)
            self._prompts(updates)
            self._leave_failed(updates)
            reading = running.reading
            running.keep(lambda row: row.goes_on, self._keep)
            # A forward that waits for experts would wait for these tokens too: nothing is gained by starting it early.
            if self._model.is_streamed:
                running.is_drawn = not running.rows
            elif running.rows:
                self._make_room()
                running.forward()
                if not running.waits_for_masks:
                    running.draw()
                elif running.logits is not None:
                    mx.async_eval(running.logits)
            updates += [running.read(row, sampled) for row, sampled in reading]
            # Masks are filled while the forward computes. Functions of a request's own wait for its logits: at the next step.
            if running.logits is not None and not running.waits_for_logits:
                running.draw()
        return updates

    def close(self) -> None:
        """Drop everything: nothing that was submitted goes on, and nothing of it is kept."""
        self._line, self._jobs = WaitingLine(), []
        self._running.reset()

    def _catch_up(self, updates: list[RowUpdate]) -> None:
        """Draw the next token of every row, where that was left to this step."""
        running = self._running
        if running.is_drawn:
            return
        try:
            if running.logits is None:
                self._make_room()
                running.forward()
            running.draw()
        except MixtralError as error:
            # What is in their caches is of no use.
            updates += [RowUpdate(row.ticket, None, True, error) for row in running.rows]
            running.reset()

    # Rows that leave

    def _leave(self, updates: list[RowUpdate]) -> None:
        """Rows that ended since the last step, wherever they are, and those that have waited too long."""
        for row in self._line.remove_expired(self._clock()):
            for member in (row, *row.siblings):
                error = QueueTimeoutError(
                    f"the request waited {member.meter.waited_s:.1f} s for its turn, as long as it was to; try again later, or "
                    "give it more time"
                )
                updates.append(RowUpdate(member.ticket, None, True, error))
        self._line.remove_finished()
        self._leave_failed(updates)
        for job in [*self._jobs]:
            job.rows = [row.successor() for row in job.rows]
            if job.is_abandoned:
                self._drop(job)
        self._running.keep(lambda row: not row.is_finished, self._keep)

    def _leave_failed(self, updates: list[RowUpdate]) -> None:
        for row in [*self._running.rows, *(row for job in self._jobs for row in job.rows)]:
            if row.error is not None:
                updates.append(RowUpdate(row.ticket, None, True, row.error))
                row.error = None

    def _keep(self, row: BatchRow, place: int) -> None:
        """What a row that leaves has in the cache, for later prompts."""
        cache = self._running.cache
        held = cache.taken[place]
        if self._prefixes is not None and self._room.keeps(cache, held):
            self._prefixes.put(row.sequence[:held], cache.extract(place))

    def _keep_prompt(self, job: PromptJob, place: int) -> None:
        """What there is of a row's prompt, for later ones."""
        row = job.rows[place]
        held = job.held(row)
        if self._prefixes is not None and self._room.keeps(self._running.cache, held):
            self._prefixes.put(row.tokens[:held], job.cache.row(place, held))

    def _drop(self, job: PromptJob) -> None:
        """Compute no more of these prompts."""
        self._jobs.remove(job)
        for place in range(len(job.rows)):
            if job.cache.length:
                self._keep_prompt(job, place)

    def _make_room(self) -> None:
        """Put rows back into the queue until the others have room for a token more: those that were admitted last."""
        while self._room.claim(self._running.cache, self._jobs, self._line.shared_tokens):
            if self._line.drop_shared():
                continue
            youngest = max(self._running.rows, key=lambda row: row.admitted)
            if self._jobs:
                job = self._jobs[-1]
                self._drop(job)
                for row in job.rows:
                    self._line.put_back(row)
                continue
            if len(self._running.rows) == 1:
                return
            self._running.keep(lambda row, gone=youngest: row is not gone, self._keep)  # type: ignore[misc]
            youngest.replay.clear()
            self._line.put_back(youngest)

    # Prompts

    def _prompts(self, updates: list[RowUpdate]) -> None:
        """Let rows in whose prompts are there, and compute a chunk of one whose turn it is."""
        while (row := self._line.take_ready(lambda row: self._fit([row]))) is not None:
            assert row.ready is not None
            shared, row.ready = row.ready, None
            self._admit(row, len(row.tokens))
            self._running.join([row], shared.logits, shared.cache, [0], keep=self._line.shares(shared))
        if (job := self._next_job()) is None:
            return
        if job.hidden is not None:
            self._begin_rows(job, job.hidden)
            return
        if is_waited_for := bool(self._running.rows):
            # The step under way is not part of the chunk's time.
            mx.eval(self._running.last)
        tokens = self._pace.tokens(is_waited_for=is_waited_for)
        try:
            self._pace.timed(lambda: self._compute(job, tokens, is_waited_for))
        except MixtralError as error:
            self._jobs.remove(job)
            for row in job.rows:
                updates += [RowUpdate(member.ticket, None, True, error) for member in (row, *row.siblings)]

    def _compute(self, job: PromptJob, tokens: int, is_waited_for: bool) -> int:
        """A chunk; how many tokens it was, 0 where they may still be computing."""
        computed, hidden = job.compute(tokens)
        if hidden is None:
            job.report()
            return computed
        if is_waited_for and job.is_long:
            # To join, its cache may be copied, and that takes time of its own.
            job.hidden = hidden
            mx.eval(hidden)
            return computed
        self._begin_rows(job, hidden)
        if is_waited_for:
            mx.eval(self._running.last)
        return computed if is_waited_for else 0

    def _begin_rows(self, job: PromptJob, hidden: mx.array) -> None:
        """The prompts are computed: their rows run now, and as many of their siblings as there is room for."""
        self._jobs.remove(job)
        # As in a step, one token a row: more would be multiplied, and rounded, as a prompt is.
        logits, running = self._model.head(hidden, job.cache.adapter)[:, -1], self._running
        rows: list[BatchRow] = []
        places: list[int] = []
        for place, row in enumerate(job.rows):
            if row.is_finished:
                continue
            self._keep_prompt(job, place)
            rows.append(row)
            places.append(place)
            shared = None
            siblings, row.siblings = row.siblings, []
            for sibling in siblings:
                sibling.admitted, sibling.deadline_s = row.admitted, None
                # Those that join with it are not in the cache yet.
                coming = self._line.shared_tokens + sum(len(other.tokens) for other in rows)
                if self._room.fits(running.cache, [*running.rows, *rows], self._jobs, coming, [sibling]):
                    sibling.meter.admit(len(sibling.tokens))
                    rows.append(sibling)
                    places.append(place)
                    continue
                if shared is None:
                    shared = SharedPrompt(job.cache.row(place, len(row.tokens)), logits[place : place + 1])
                    mx.eval(shared.logits, shared.cache.arrays)
                sibling.ready = shared
                self._line.put_back(sibling)
        if rows:
            self._running.join(rows, logits[mx.array(places)], job.cache, places)

    def _next_job(self) -> PromptJob | None:
        """The prompt to compute a chunk of: one that is under way, or a much shorter one that goes ahead of it."""
        if self._jobs:
            job = self._jobs[-1]
            if len(self._jobs) == 1 and job.overtaken < MAX_OVERTAKEN:
                chosen = self._line.take(self._fit, most_tokens=int(SHORT_SHARE * job.left))
                job.overtaken += bool(chosen)
                self._begin_job(chosen)
            return self._jobs[-1]
        self._begin_job(self._line.take(self._fit))
        return self._jobs[-1] if self._jobs else None

    def _begin_job(self, rows: list[BatchRow]) -> None:
        """Begin to compute prompts, from where an earlier one has them."""
        if not rows:
            return
        cache = taken(self._prefixes, rows[0], self._model.min_prompt_tokens) if len(rows) == 1 else None
        if cache is None:
            most = max(len(row.tokens) for row in rows)
            cache = self._model.make_cache(max_tokens=most, adapter=rows[0].request.adapter)
        for row in rows:
            self._admit(row, min(cache.length, len(row.tokens)))
        row = rows[0]
        if cache.length < len(row.tokens):
            self._jobs.append(PromptJob(self._model, rows, cache))
            self._room.claim(self._running.cache, self._jobs, self._line.shared_tokens)
            return
        # It was put back, and all of its prompt was kept: the tokens it made since are fed again.
        held = cache.length
        row.replay.extend(row.sequence[held + 1 :])
        row.unread = None
        self._running.add([row], mx.array(row.sequence[held : held + 1], mx.int32), cache, [(0, held)])

    def _admit(self, row: BatchRow, reused: int) -> None:
        self._admitted += 1
        row.admitted, row.deadline_s = self._admitted, None
        if not row.made:
            row.meter.admit(reused)

    def _fit(self, rows: list[BatchRow]) -> bool:
        return self._room.fits(self._running.cache, self._running.rows, self._jobs, self._line.shared_tokens, rows)
