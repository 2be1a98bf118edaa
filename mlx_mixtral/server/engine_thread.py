"""The one thread that loads the model and makes every MLX call; everybody else puts messages into its inbox."""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

import mlx.core as mx

from mlx_mixtral.errors import GroupError, MixtralError
from mlx_mixtral.generation.scheduler import DEFAULT_MAX_STALL_S
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.runtime.rows import MAX_ROWS, default_rows
from mlx_mixtral.server.jobs import Ended, Failed, JobEvent, ServerJob
from mlx_mixtral.server.rows import EngineRows
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["EngineState", "EngineThread", "Snapshot"]

MAX_FAILURES, FAILURE_WINDOW_S = 3, 60.0
LOOK_S = 0.5
"""How often an idle engine sees whether all machines of its group are there."""

ENGINE_FAILED = ApiError(500, "the engine failed while it computed this answer; try again", code="engine_failed")

logger = logging.getLogger(__name__)

Delivery = tuple[ServerJob, list[JobEvent]]


class EngineState(StrEnum):
    """What the engine thread is doing."""

    LOADING = "loading"
    READY = "ready"
    UNLOADED = "unloaded"
    """The weights were released; the next request loads them again."""
    REBUILDING = "rebuilding"
    """It failed, and loads the model again."""
    DEAD = "dead"
    CLOSED = "closed"


@dataclass(frozen=True)
class Snapshot:
    """The engine at the end of its last step."""

    running_rows: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    cached_prefix_bytes: int = 0
    cached_prefixes: int = 0
    weights_bytes: int = 0


@dataclass(frozen=True)
class _Add:
    job: ServerJob


@dataclass(frozen=True)
class _Cancel:
    job: ServerJob


@dataclass(frozen=True)
class _Exclusive:
    work: Callable[[Mixtral], object]
    result: Future[object]


class _Close:
    pass


class EngineThread:
    """Loads the model, and carries out jobs until it is closed.

    After an error in a step every open job fails, and the model is loaded once more; the third failure within
    ``FAILURE_WINDOW_S`` (60 s), or one to load, ends it. So does the first on several machines, which load together or not at
    all; ``group_error`` then says what happened.

    Args:
        load: makes the model; called on the thread, and again after a failure or idle time.
        max_rows: generations at once; what the plan in force allows when None: see ``default_rows``.
        post: told the events of a step, in one call, on the thread.
        changed: told that the state changed, on the thread.
        max_stall_s: how long a chunk of a prompt may take while rows wait for it.
        idle_unload_s: the weights are released after so long without a job; None: never.
    """

    def __init__(
        self,
        load: Callable[[], Mixtral],
        max_rows: int | None,
        post: Callable[[Sequence[Delivery]], None],
        changed: Callable[[EngineState], None] = lambda state: None,
        *,
        max_stall_s: float = DEFAULT_MAX_STALL_S,
        idle_unload_s: float | None = None,
    ) -> None:
        self._load, self._max_rows, self._post, self._changed = load, max_rows, post, changed
        self._max_stall_s = max_stall_s
        self._idle_unload_s = idle_unload_s
        self._inbox: queue.SimpleQueue[_Add | _Cancel | _Exclusive | _Close] = queue.SimpleQueue()
        self._open: dict[ServerJob, None] = {}
        self._pending: dict[ServerJob, list[JobEvent]] = {}
        self._deferred: list[_Exclusive] = []
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._model: Mixtral | None = None
        self._is_closing = False
        self._first: Future[Mixtral] = Future()
        self._thread = threading.Thread(target=self._main, name="mlx-mixtral-engine", daemon=True)
        self.state = EngineState.LOADING
        self.snapshot = Snapshot()
        self.failures = 0
        """Failures so far."""
        self.group_error: GroupError | None = None
        self.rows = max_rows or MAX_ROWS
        """Generations at once, from the first load on."""

    def start(self) -> Future[Mixtral]:
        """Begin to load; the result is the loaded model, of which other threads may use the tokenizer and plain facts."""
        self._thread.start()
        return self._first

    def add(self, job: ServerJob) -> None:
        """Carry out a job; its events are posted. Any thread."""
        self._inbox.put(_Add(job))

    def cancel(self, job: ServerJob) -> None:
        """End a job before the next step; nothing more is posted of it. Any thread."""
        self._inbox.put(_Cancel(job))

    def exclusive(self, work: Callable[[Mixtral], object]) -> Future[object]:
        """Run ``work`` on the thread while nothing is generated. Any thread."""
        result: Future[object] = Future()
        self._inbox.put(_Exclusive(work, result))
        return result

    def close(self, timeout_s: float | None = None) -> bool:
        """Fail what is open, release the model and end the thread; whether it ended in time."""
        self._is_closing = True
        self._inbox.put(_Close())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._model = self._load()
            if self._max_rows is None:
                engine = self._model.engine
                self.rows = default_rows(engine.plan, engine.forward_cost())
        except BaseException as error:
            self._become(EngineState.DEAD)
            self._first.set_exception(error)
            return
        if (link := self._model.engine.link) is not None:
            link.group.deadline.on_end = self._group_ended
        self._note(0)
        self._become(EngineState.READY)
        self._first.set_result(self._model)
        while not self._is_closing and self.state is not EngineState.DEAD:
            try:
                self._work()
            except Exception as error:
                self._failed(error)
        if self.state is not EngineState.DEAD:
            self._fail_open(ApiError(503, "the server is shutting down; try again"))
            self._release()
            self._become(EngineState.CLOSED)

    def _work(self) -> None:
        """Wait for jobs and carry them out; returns when the thread is to end."""
        while not self._is_closing:
            self._wait()
            self._run_deferred()
            if self._open:
                model = self._loaded()
                with EngineRows(model, self.rows, self._max_stall_s, self._collect) as rows:
                    self._generate(rows)
                # What the rows had is given back only now.
                del rows, model
                self._note(0)
            self._flush()

    def _wait(self) -> None:
        """Take messages until there is a job to do."""
        while not (self._open or self._deferred or self._is_closing):
            link = None if self._model is None else self._model.engine.link
            idle_s = self._idle_unload_s if self.state is EngineState.READY else None
            try:
                message = self._inbox.get(timeout=idle_s if link is None else LOOK_S)
            except queue.Empty:
                if link is not None:
                    link.look()
                    continue
                self._release()
                self._become(EngineState.UNLOADED)
                continue
            self._take(message, None)
            self._flush()

    def _generate(self, rows: EngineRows) -> None:
        """Steps until nothing is open. Messages are taken between two of them."""
        for job in list(self._open):
            rows.add(job)
        while True:
            while not self._inbox.empty():
                self._take(self._inbox.get(), rows)
            if self._is_closing or rows.is_idle:
                break
            rows.step()
            self._note(rows.running)
            self._flush()

    def _take(self, message: _Add | _Cancel | _Exclusive | _Close, rows: EngineRows | None) -> None:
        if isinstance(message, _Add):
            self._open[message.job] = None
            # Whoever wants the model alone gets it when what runs now is done: nothing joins until then.
            if rows is not None and not self._deferred:
                rows.add(message.job)
        elif isinstance(message, _Cancel):
            self._open.pop(message.job, None)
            self._pending.pop(message.job, None)
            if rows is not None:
                rows.cancel(message.job)
        elif isinstance(message, _Exclusive):
            self._deferred.append(message)

    def _run_deferred(self) -> None:
        while self._deferred:
            message = self._deferred.pop(0)
            if not message.result.set_running_or_notify_cancel():
                continue
            try:
                message.result.set_result(message.work(self._loaded()))
            except Exception as error:
                message.result.set_exception(error)
                if isinstance(error, GroupError):
                    raise

    def _collect(self, job: ServerJob, event: JobEvent) -> None:
        self._pending.setdefault(job, []).append(event)

    def _flush(self) -> None:
        """Post what was collected, in one call."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        for job, events in pending.items():
            if isinstance(events[-1], Ended | Failed):
                self._open.pop(job, None)
        self._post(list(pending.items()))

    def _failed(self, error: Exception) -> None:
        """A step, or loading again, raised: end what is open, and build the engine anew."""
        # Our own errors and MLX's say nothing of a prompt; others might.
        said = f": {_one_line(error)}" if isinstance(error, MixtralError) or type(error) is RuntimeError else ""
        line = f"the engine failed: {type(error).__name__}{said}"
        if self._model is not None and self._model.engine.link is not None:
            # What was computed with others cannot be given back, nor loaded again without them.
            self._pending.clear()
            self._group_ended(str(error) if isinstance(error, GroupError) else f"{line}; start all machines again")
            return
        logger.error("%s", line)
        self.failures += 1
        self._failures.append(time.monotonic())
        too_many = len(self._failures) == MAX_FAILURES and self._failures[-1] - self._failures[0] < FAILURE_WINDOW_S
        self._become(EngineState.DEAD if too_many else EngineState.REBUILDING)
        self._pending.clear()
        self._fail_open(ENGINE_FAILED)
        del error
        self._release()
        if too_many:
            return
        try:
            self._model = self._load()
        except Exception as reason:
            logger.error("the model cannot be loaded again: %s", _one_line(reason))
            self._become(EngineState.DEAD)
            return
        self._note(0)
        self._become(EngineState.READY)

    def _group_ended(self, said: str) -> None:
        """A machine is lost, or silent: end what is open. Called on another thread where this one waits inside MLX for good."""
        self.group_error = self.group_error or GroupError(said)
        self.failures += 1
        self._fail_open(ENGINE_FAILED)
        self._become(EngineState.DEAD)

    def _fail_open(self, error: ApiError) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get(), None)
        deferred, self._deferred = self._deferred, []
        for message in deferred:
            message.result.set_exception(error)
        failed, self._open = list(self._open), {}
        if failed:
            self._post([(job, [Failed(error)]) for job in failed])

    def _loaded(self) -> Mixtral:
        if self._model is None:
            self._become(EngineState.LOADING)
            self._model = self._load()
            self._become(EngineState.READY)
        return self._model

    def _release(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            # A model whose step raised may not close cleanly; its arrays go with the last reference to it.
            with contextlib.suppress(MixtralError, RuntimeError):
                model.close()
        del model
        gc.collect()
        mx.clear_cache()
        self._note(0)

    def _note(self, running: int) -> None:
        engine = None if self._model is None else self._model.engine
        kept = None if engine is None else engine.prompt_cache.kept
        self.snapshot = Snapshot(
            running_rows=running,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            cached_prefix_bytes=0 if kept is None else kept.nbytes,
            cached_prefixes=0 if kept is None else len(kept),
            weights_bytes=0 if engine is None or engine.is_closed else engine.residency.resident_bytes,
        )

    def _become(self, state: EngineState) -> None:
        if state is not self.state:
            self.state = state
            self._changed(state)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
