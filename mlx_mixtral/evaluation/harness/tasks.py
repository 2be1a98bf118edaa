"""Tasks of lm_eval by name, its own ones and a folder's, run on a model."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_mixtral.arguments import as_path, check_callbacks, check_integer, check_type
from mlx_mixtral.errors import HubError, InvalidRequestError, MissingDependencyError, MixtralError
from mlx_mixtral.installing import how_to_install

if TYPE_CHECKING:
    from mlx_mixtral.evaluation.harness.lm import HarnessLM

__all__ = ["LoadedTasks", "TaskResults", "TaskScore", "check_harness", "load_tasks", "run_tasks"]

# What lm_eval's own command seeds with: shots are drawn, and some tasks shuffle.
SEED, NUMPY_SEED, SHOTS_SEED = 0, 1234, 1234
BOOTSTRAP = 1000
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task, or of a group of tasks.

    Args:
        filter: what lm_eval made of the model's text before it was compared; "none" where nothing was.
        stderr: standard error, where lm_eval gives one.
        shots: examples in front of each question; None for a group whose tasks differ.
        samples: questions that were asked.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    shots: int | None
    samples: int | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TaskResults:
    """Scores in the order the tasks were asked for, groups before their tasks.

    Args:
        truncated: requests that were longer than the context, and lost their start.
        harness: version of lm_eval.
    """

    scores: tuple[TaskScore, ...]
    truncated: int
    seconds: float
    harness: str


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose data are here. ``content`` is what lm_eval's ``TaskManager.load`` gives."""

    names: tuple[str, ...]
    content: dict[str, dict[str, Any]]


def check_harness() -> None:
    """Raise MissingDependencyError where there is no lm_eval."""
    try:
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise MissingDependencyError(
            f"tasks need lm-evaluation-harness ({error}): {how_to_install('lm-eval', 'eval')}"
        ) from error


def load_tasks(
    names: Sequence[str],
    *,
    shots: int | None = None,
    path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedTasks:
    """Find tasks and groups by name, and fetch their data.

    Args:
        shots: examples in front of each question; the task's own number when None. A task that is fixed to none stays so.
        path: folder of task files (YAML) that come before lm_eval's own of the same name.
        progress: called with how many tasks are loaded, of how many.

    Raises:
        MissingDependencyError: no lm_eval.
        InvalidRequestError: a name that is not known, a folder without tasks, a task that cannot be read or runs code.
        HubError: data that cannot be fetched.
    """
    check_type("names", names, (list, tuple), "a list of names")
    check_callbacks(progress=progress)
    if shots is not None:
        check_integer("shots", shots, 0)
    if not names:
        raise InvalidRequestError("no task was named; give at least one, such as hellaswag")
    folder = None if path is None else _task_folder(path)
    check_harness()
    with _quiet(), _seeded():
        manager = _manager(names, folder)
        content: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for index, name in enumerate(names):
            if progress is not None:
                progress(index, len(names))
            for part, found in _load(manager, name).items():
                content[part] |= found
        for name, task in content["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InvalidRequestError(
                    f"task {name} runs code written by a model, which is not supported; leave it out"
                )
            own = task.get_config("num_fewshot")
            if shots is not None and own != 0:
                task.set_config(key="num_fewshot", value=shots)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SHOTS_SEED)
    if progress is not None:
        progress(len(names), len(names))
    return LoadedTasks(tuple(names), content)


def run_tasks(
    model: HarnessLM, tasks: LoadedTasks, *, limit: int | None = None, chat_template: bool = False
) -> TaskResults:
    """Ask ``model`` all questions of ``tasks``.

    Args:
        limit: only so many questions of each task, its first ones.
        chat_template: ask in the checkpoint's chat format, each shot as a turn of its own.

    Raises:
        InvalidRequestError: a task whose questions cannot be made.
        Anything that the model's ``Responder`` raises.
    """
    import lm_eval
    from lm_eval.evaluator import evaluate

    if limit is not None:
        check_integer("limit", limit, 1)
    started = time.perf_counter()
    before = model.responder.truncated
    model.is_asked = False  # an error of the run before left it set
    with _quiet(), _seeded():
        try:
            found = evaluate(
                lm=model,
                task_dict=tasks.content,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
        except MixtralError:
            raise
        except Exception as error:
            if model.is_asked:
                raise
            names = ", ".join(tasks.names)
            raise InvalidRequestError(
                f"tasks {names} cannot be run: {_first_line(error)}; check their files"
            ) from error
    seconds = time.perf_counter() - started
    return TaskResults(tuple(_scores(found)), model.responder.truncated - before, seconds, str(lm_eval.__version__))


def _task_folder(path: str | Path) -> Path:
    folder = as_path("the folder of tasks", path)
    if not folder.is_dir():
        raise InvalidRequestError(f"{folder} is not a folder; give one that holds task files (.yaml)")
    if next(folder.glob("**/*.yaml"), None) is None:
        raise InvalidRequestError(f"folder {folder} holds no tasks: it has no .yaml file")
    return folder


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """What knows tasks by name. lm_eval's own are thousands of files, read only when a name is not the folder's."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if not manager.all_tasks:
            raise InvalidRequestError(f"folder {folder} holds no tasks: no .yaml file in it has a task or a group")
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3, 0.7)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            where = "lm_eval" if folder is None else f"lm_eval and folder {folder}"
            raise InvalidRequestError(
                f"task {name!r} is unknown to {where}{hint or '; run `lm_eval ls tasks` for a list'}"
            )
    return manager


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    try:
        loaded: dict[str, dict[str, Any]] = manager.load([name])
    except MixtralError:
        raise
    except Exception as error:
        # What the hub's clients raise when there is no network, no such data set, or no leave to have it.
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
            raise HubError(
                f"the data of task {name} cannot be fetched ({_first_line(error)}); connect to the internet for the first "
                "run, or give tasks of local files with --task-path"
            ) from error
        raise InvalidRequestError(f"task {name} cannot be loaded: {_first_line(error)}") from error
    return loaded


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:SHOWN_CHARACTERS]}"


def _scores(found: Any) -> Iterator[TaskScore]:
    for task, metrics in found["results"].items():
        samples = found["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{name}")
            stderr = float(error) if isinstance(error, int | float) else None
            yield TaskScore(task, metric, name, float(value), stderr, found["n-shot"].get(task), samples)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval prints, logs and draws bars; while it works for this program it does not."""
    import datasets
    import lm_eval.api.metrics as metrics
    import lm_eval.api.task as tasks

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars, drawn = tasks.tqdm, datasets.are_progress_bars_disabled()
    bootstrap = metrics.bootstrap_stderr
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tasks.tqdm = lambda items, *_, **__: items
    datasets.disable_progress_bars()
    metrics.bootstrap_stderr = _bootstrap_stderr
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tasks.tqdm = bars
        if not drawn:
            datasets.enable_progress_bars()
        metrics.bootstrap_stderr = bootstrap


def _bootstrap_stderr(metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int) -> float:
    """As lm_eval's own, which forks: a process with MLX's threads had better not."""
    draw = random.Random(SEED)
    return statistics.stdev(float(metric(draw.choices(values, k=len(values)))) for _ in range(iters))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers of Python and NumPy as lm_eval's own command has them; afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
