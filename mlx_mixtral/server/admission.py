"""Who may join: a bounded number of open generations, 429 beyond it, and what becomes of each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from mlx_mixtral.server.engine_thread import EngineState, EngineThread
from mlx_mixtral.server.jobs import Failed, JobEvent, ServerJob
from mlx_mixtral.server.metrics import Metrics
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["Admission"]

MAX_RETRY_S = 60
USUAL_JOB_S = 2.0
"""How long a job takes, until some have been seen."""


class Admission:
    """The open jobs, on the loop's thread: each joins, gets its events, and leaves once.

    Args:
        engine: carries them out.
    """

    def __init__(self, engine: EngineThread, options: ServerOptions, metrics: Metrics) -> None:
        self._engine, self._options, self._metrics = engine, options, metrics
        self._timers: dict[ServerJob, asyncio.TimerHandle] = {}
        self._on_overflow: dict[ServerJob, Callable[[], None]] = {}
        self._open: dict[ServerJob, None] = {}
        self._usual_s = USUAL_JOB_S
        self.is_draining = False
        """Whether nobody may join any more."""

    @property
    def open_rows(self) -> int:
        return sum(job.size for job in self._open)

    @property
    def waiting_rows(self) -> int:
        return sum(job.size for job in self._open if job.began_at is None)

    @property
    def open_jobs(self) -> int:
        return len(self._open)

    def check(self, size: int) -> None:
        """That a job of ``size`` rows may join.

        Raises:
            ApiError: 429 with Retry-After: there are too many; 503: the server ends, or the engine is dead.
        """
        if self.is_draining or self._engine.state is EngineState.CLOSED:
            raise ApiError(503, "the server is shutting down; send the request again when it is back")
        if self._engine.state is EngineState.DEAD:
            raise ApiError(503, "the engine failed too often and is down; start the server again")
        most = self._engine.rows + self._options.queue
        if self.open_rows + size > most:
            self._metrics.count("mlx_mixtral_requests_refused_total", reason="queue_full")
            raise ApiError(
                429,
                f"{self.open_rows} generations are running or waiting, and {most} may be; try again later",
                headers={"retry-after": str(self._retry_s())},
            )

    def join(self, job: ServerJob, on_overflow: Callable[[], None]) -> None:
        """Begin a job, which ``leave`` must end; ``on_overflow`` is called when its reader is too slow. Raises as ``check``."""
        self.check(job.size)
        self._open[job] = None
        self._on_overflow[job] = on_overflow
        loop = asyncio.get_running_loop()
        self._timers[job] = loop.call_later(self._options.queue_timeout_s, self._waited_too_long, job)
        self._engine.add(job)

    def leave(self, job: ServerJob) -> None:
        """The job's reply is done, or nobody waits for it: what is left of it is cancelled."""
        if job not in self._open:
            return
        del self._open[job], self._on_overflow[job]
        self._timers.pop(job).cancel()
        if job.is_over:
            took_s = time.monotonic() - job.opened_at
            self._usual_s += 0.1 * (took_s - self._usual_s)
        else:
            self._metrics.count("mlx_mixtral_requests_cancelled_total")
            self._engine.cancel(job)

    def deliver(self, deliveries: Sequence[tuple[ServerJob, Sequence[JobEvent]]]) -> None:
        """Give each job its events of a step."""
        for job, events in deliveries:
            if job not in self._open:
                continue
            job.deliver(events)
            if job.is_overflowing:
                self._on_overflow[job]()

    def fail_all(self, error: ApiError) -> None:
        """End every open job with an error."""
        for job in list(self._open):
            if not job.is_over:
                self._engine.cancel(job)
                job.deliver([Failed(error)])

    def _waited_too_long(self, job: ServerJob) -> None:
        if job.began_at is None and not job.is_over:
            self._metrics.count("mlx_mixtral_requests_refused_total", reason="queue_timeout")
            self._engine.cancel(job)
            waited_s = self._options.queue_timeout_s
            job.deliver(
                [
                    Failed(
                        ApiError(
                            503,
                            f"the request waited {waited_s:g} s for its turn; try again later",
                            code="queue_timeout",
                        )
                    )
                ]
            )

    def _retry_s(self) -> int:
        """About how long until a place is free."""
        rounds = self.waiting_rows / max(1, self._engine.rows)
        return min(MAX_RETRY_S, max(1, math.ceil(rounds * self._usual_s)))
