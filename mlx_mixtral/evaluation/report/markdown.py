"""Markdown as the hub and GitHub read it (https://github.github.com/gfm/): text that is only text, tables, fenced code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["escaped", "fenced", "image", "table"]

# What begins emphasis, code, links, tags, entities, formulas, strikethrough or a cell, or ends a heading.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")


def escaped(text: str) -> str:
    """``text`` on one line, shown as it is wherever in a line it stands; control characters become U+FFFD."""
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return _SPECIAL.sub(r"\\\1", shown)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table; cells are escaped here. The first ``left`` columns are flush left, the others right."""
    lines = [_row(columns), "|" + "".join(" :--- |" if at < left else " ---: |" for at in range(len(columns)))]
    for row in rows:
        assert len(row) == len(columns), row
        lines.append(_row(row))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def fenced(text: str, language: str) -> str:
    """``text`` as a block of code, whatever backticks it has."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def image(what: str, path: str) -> str:
    """A picture by its path from the file it is in."""
    return f"![{escaped(what)}]({path})"
