"""Loading a model, from the hub if need be, with progress bars where there is a terminal to draw them on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mixtral import LoadProgress, Mixtral, load
from mlx_mixtral.cli.console import err_console
from mlx_mixtral.hub import resolve

__all__ = ["LoadedModel", "byte_progress", "count_progress", "fetch", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and the seconds it took to load, downloading not counted."""

    model: Mixtral
    load_s: float


def byte_progress() -> Any:
    """A progress bar in bytes on stderr: share, rate and remaining time. It is gone when it ends."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=err_console(),
        transient=True,
    )


@contextlib.contextmanager
def count_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal, told what is done of how much."""
    if not err_console().is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err_console(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def fetch(source: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of ``source``, downloaded first if it is a hub repository."""
    if not err_console().is_terminal:
        return resolve(source, revision=revision, weights=weights)
    with byte_progress() as progress:
        task = progress.add_task("downloading", total=None, visible=False)

        def show(done_bytes: int, total_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes, visible=True)

        return resolve(source, revision=revision, weights=weights, progress=show)


def load_model(source: str | Path, *, revision: str | None = None, **options: Any) -> LoadedModel:
    """``mlx_mixtral.load``, with bars on stderr when that is a terminal."""
    folder = fetch(str(source), revision=revision)
    started = time.perf_counter()
    if not err_console().is_terminal:
        model = load(folder, **options)
        return LoadedModel(model, time.perf_counter() - started)
    with byte_progress() as progress:
        task = progress.add_task("loading", total=None)

        def show(at: LoadProgress) -> None:
            progress.update(task, completed=at.done_bytes, total=at.total_bytes)

        model = load(folder, progress=show, **options)
    return LoadedModel(model, time.perf_counter() - started)
