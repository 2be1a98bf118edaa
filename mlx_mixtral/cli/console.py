"""What every command writes with: notes on stderr, JSON and tables on stdout, numbers in one style."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "emit_json",
    "err_console",
    "figures",
    "json_text",
    "note",
    "one_line",
    "out_console",
    "plural",
    "print_table",
    "rate",
    "seconds",
    "terminal_safe",
]

# Control characters a checkpoint's text could steer a terminal with; newline and tab stay.
_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def one_line(message: object) -> str:
    """A message as one printable line, whatever names from a checkpoint are in it."""
    return terminal_safe(" ".join(str(message).split("\n"))).replace("\t", " ").strip()


def terminal_safe(text: str) -> str:
    """Text without control characters but newline and tab."""
    return text.translate(_CONTROL)


def emit_json(result: object) -> None:
    """Print ``result`` on stdout as JSON; NaN and infinities, which JSON has not, become null."""
    ascii_only = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    click.echo(json_text(result, ascii_only=ascii_only))


def json_text(result: object, *, ascii_only: bool = False) -> str:
    """As ``emit_json`` prints it."""
    return json.dumps(_finite(result), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _finite(value: object) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def rate(tokens_per_second: float) -> str:
    """``34.7 tok/s``: three figures."""
    return f"{figures(tokens_per_second)} tok/s"


def figures(value: float) -> str:
    """A number with three figures, never in exponents."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plural(count: int, noun: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def seconds(duration: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if duration < 59.95:
        return f"{duration:.2f} s" if duration < 9.995 else f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def out_console() -> Console:
    """Rich on stdout; nothing that comes from a file is read as markup."""
    return _console(stderr=False)


def err_console() -> Console:
    """Rich on stderr, for progress bars."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            # Rich would exit with status 1, which here means an error in one line.
            raise BrokenPipeError

    return Plain(stderr=stderr, markup=False, highlight=False, emoji=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """A titled table on stdout: the first ``left`` columns flush left, numbers flush right."""
    from rich import box
    from rich.table import Table

    console = out_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    for row in rows:
        table.add_row(*[terminal_safe(cell) for cell in row])
    if title:
        console.print(title, style="bold")
    console.print(table)
    console.print()
