"""Progress bars on stderr, where that is a terminal to draw them on; elsewhere nothing is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mlx_mixtral.cli.console import err_console, seconds
from mlx_mixtral.hub import resolve

__all__ = ["byte_bars", "byte_progress", "count_progress", "fetch", "share_bars"]

Show = Callable[[int, int], None]
"""Told what is done of how much."""


def byte_progress(what: str, *, visible: bool = True) -> AbstractContextManager[Show]:
    """A bar in bytes; one that is not ``visible`` appears with its first bytes."""
    return _bar(what, byte_bars, visible)


def count_progress(what: str) -> AbstractContextManager[Show]:
    """A bar of things that are counted."""
    return _bar(what, _count_bars, True)


def byte_bars() -> Any:
    """Rich's bars in bytes: share, rate and remaining time. They are gone when they end."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bars(DownloadColumn(), TransferSpeedColumn())


def share_bars() -> Any:
    """Bars of a share of all work."""
    from rich.progress import TaskProgressColumn

    return _bars(TaskProgressColumn())


def _count_bars() -> Any:
    from rich.progress import MofNCompleteColumn

    return _bars(MofNCompleteColumn())


@contextlib.contextmanager
def _bar(what: str, bars: Callable[[], Any], visible: bool) -> Iterator[Show]:
    if not err_console().is_terminal:
        yield lambda done, total: None
        return
    with bars() as progress:
        task = progress.add_task(what, total=None, visible=visible)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _bars(*columns: Any) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        """Of a task that has a field ``seconds_left``, that: steps that take minutes give Rich no pace of their own."""

        def render(self, task: Any) -> Text:
            if "seconds_left" not in task.fields:
                return super().render(task)
            left = task.fields["seconds_left"]
            return Text("-:--:--" if left is None else f"{seconds(left)} left", style="progress.remaining")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        *columns,
        TimeLeft(compact=True),
        console=err_console(),
        transient=True,
    )


def fetch(source: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of ``source``, downloaded first if it is a hub repository."""
    with byte_progress("downloading", visible=False) as show:
        return resolve(source, revision=revision, weights=weights, progress=show)
