"""What every command writes with: notes on stderr, JSON and tables on stdout, numbers in one style."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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

# Columns a name keeps in a narrow table.
LEAST_NAME = 16
# Control characters a checkpoint's text could steer a terminal with; newline and tab stay.
_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def note(message: str) -> None:
    """Lines on stderr; on a terminal each is wrapped at words, and hangs where a wide gap divides a name from its text."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        message = "\n".join(_wrapped(line, width) for line in message.split("\n"))
    click.echo(message, err=True)


def _wrapped(line: str, width: int) -> str:
    gap = re.match(r"\S+(?: \S+)* {2,}", line)
    indent = gap.end() if gap is not None and 2 * gap.end() <= width else 0
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


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
    """A titled table on stdout: the first ``left`` columns flush left, numbers flush right.

    No cell is cropped. Where the terminal is too narrow, names wrap, those of columns first; where that is not enough each row
    is printed as a list of names and values.
    """
    console, cells = out_console(), [[terminal_safe(cell) for cell in row] for row in rows]
    if title:
        console.print(title, style="bold")
    wrapped = ["\n".join(name.split(" ")) for name in columns]
    if _width(columns, cells) <= console.width:
        console.print(_table(columns, cells, left))
    elif _width(wrapped, cells, left, LEAST_NAME) <= console.width:
        console.print(_table(wrapped, cells, left))
    else:
        for row in cells:
            _print_pairs(console, columns, row, left)
    console.print()


def _width(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0, most: int = 0) -> int:
    """Columns of a terminal that a table takes, its first ``left`` ones ``most`` wide at most."""
    from rich.cells import cell_len

    widths = [
        max(map(cell_len, (line for cell in column for line in cell.split("\n"))), default=0)
        for column in zip(headers, *rows, strict=True)
    ]
    return sum(min(width, most) if index < left else width for index, width in enumerate(widths)) + 3 * len(widths) - 3


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")
    for index, name in enumerate(headers):
        is_name = index < left
        table.add_column(name, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for row in rows:
        table.add_row(*row)
    return table


def _print_pairs(console: Console, columns: Sequence[str], row: Sequence[str], left: int) -> None:
    console.print(" ".join(cell for cell in row[:left] if cell), style="bold")
    pairs = [(name, cell) for name, cell in zip(columns[left:], row[left:], strict=True) if cell]
    longest = max((len(name) for name, _ in pairs), default=0)
    fits = all(longest + len(cell) + 4 <= console.width for _, cell in pairs)
    for name, cell in pairs:
        console.print(f"  {name:<{longest}}  {cell}" if fits else f"  {name}\n    {cell}", soft_wrap=True)
