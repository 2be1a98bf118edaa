"""Charts as inline SVG for a page: colours come from its style sheet, so that they follow light and dark.

Every chart is drawn for the width of a phone, where text stays legible; a page puts several side by side where there is room.
Exact numbers are in `<title>` elements, which browsers show under the pointer and screen readers read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from mlx_mixtral.evaluation.routing.excerpt import domain_colour

__all__ = ["bar_chart", "grid_chart", "legend", "line_chart"]

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 10, 34
DASHES = ("", "6 3", "2 2", "8 3 2 3")
MARKS = 8

Floats = npt.NDArray[np.float64]
Show = Callable[[float], str]


def line_chart(
    curves: Mapping[str, Floats],
    title: str,
    show: Show,
    tick: Show,
    *,
    top: float,
    chance: float | None = None,
    axis: str = "layer",
) -> str:
    """A line for each name over its index, from 0 to ``top``; ``chance`` is a dashed line across.

    ``show`` writes a value, ``tick`` one on the axis.
    """
    count = max(len(values) for values in curves.values())
    parts = [_frame(top, tick), _x_axis(_index_ticks(count), count, axis)]
    if chance is not None:
        parts.append(_across(chance, top, f"random {show(chance)}"))
    for index, (name, values) in enumerate(curves.items()):
        colour, dash = domain_colour(index), DASHES[index // MARKS % len(DASHES)]
        points = [(_x(at, count), _y(value, top), at, value) for at, value in enumerate(values) if np.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        for x, y, at, value in points:
            parts.append(_mark(index, x, y, colour, f"{name}, {axis} {at}: {show(value)}"))
    return _svg(title, parts, HEIGHT)


def bar_chart(
    groups: Mapping[str, Floats], title: str, show: Show, tick: Show, *, chance: float, axis: str = "expert"
) -> str:
    """For each index a group of bars, one a name, as the paper's figure 7; ``chance`` is a dashed line across."""
    count, names = max(len(values) for values in groups.values()), len(groups)
    top = _ceiling(max(chance, *(float(np.nanmax(values)) for values in groups.values())))
    parts = [_frame(top, tick), _x_axis([(at, str(at)) for at in range(count)], count, axis, in_middle=True)]
    room = (WIDTH - LEFT - RIGHT) / count
    width = room * 0.86 / names
    for index, (name, values) in enumerate(groups.items()):
        bars = []
        for at, value in enumerate(values):
            x, y = LEFT + at * room + room * 0.07 + index * width, _y(value, top)
            bars.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width * 0.9:.1f}" height="{HEIGHT - BOTTOM - y:.1f}">'
                f"<title>{escape(name)}, {axis} {at}: {show(value)}</title></rect>"
            )
        parts.append(f'<g fill="{domain_colour(index)}">{"".join(bars)}</g>')
    parts.append(_across(chance, top))
    return _svg(title, parts, HEIGHT)


def grid_chart(
    ratios: Floats,
    title: str,
    show: Callable[[int, int], str],
    *,
    rows: str,
    columns: str,
    cell: float,
    written: bool,
    text_size: int = 11,
) -> str:
    """A map of ``[rows, columns]`` ratios to what is expected: none at 1, one colour above, another below.

    ``show`` says a cell in words; ``written`` puts the ratio into it. ``text_size`` is that of the style sheet.
    """
    height, width = ratios.shape
    side = (WIDTH - LEFT - RIGHT) / width
    parts = []
    with np.errstate(divide="ignore", invalid="ignore"):
        strengths = np.clip(np.abs(np.log2(ratios)) / 2, 0, 1)
    for row in range(height):
        for column in range(width):
            value = ratios[row, column]
            if not np.isfinite(value):
                continue
            x, y, kind = LEFT + column * side, TOP + row * cell, "hi" if value >= 1 else "lo"
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{cell - 0.7:.1f}" '
                f'fill-opacity="{strengths[row, column]:.2f}"><title>{escape(show(row, column))}</title></rect>'
            )
            if written:
                text = f"{value:.1f}" if value < 9.95 else "≥10"
                parts.append(f'<text class="num" x="{x + side / 2:.1f}" y="{y + cell / 2 + 4:.1f}">{text}</text>')
    bottom = TOP + height * cell
    every = max(1, -(-height // 12), int(-(-text_size // cell)))
    parts += [
        f'<text class="end" x="{LEFT - 6}" y="{TOP + row * cell + cell / 2 + text_size / 3:.1f}">{row}</text>'
        for row in range(0, height, every)
    ]
    step = max(1, -(-width // 16))
    parts += [
        f'<text class="mid" x="{LEFT + (column + 0.5) * side:.1f}" y="{bottom + text_size + 2:.1f}">{column}</text>'
        for column in range(0, width, step)
    ]
    parts.append(
        f'<text class="mid" x="{(WIDTH + LEFT) / 2:.0f}" y="{bottom + 2.4 * text_size + 2:.1f}">{columns}</text>'
    )
    middle = TOP + height * cell / 2
    parts.append(f'<text class="mid" transform="translate({text_size} {middle:.1f}) rotate(-90)">{rows}</text>')
    return _svg(title, parts, bottom + 3 * text_size + 2)


def legend(names: Sequence[str]) -> str:
    """The lines and marks of charts, by name."""
    items = []
    for index, name in enumerate(names):
        colour, dash = domain_colour(index), DASHES[index // MARKS % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        items.append(
            f'<li><svg viewBox="0 0 26 12" aria-hidden="true"><line x1="1" x2="25" y1="6" y2="6" stroke="{colour}" '
            f'stroke-width="2"{dashes}/>{_mark(index, 13, 6, colour, "")}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _frame(top: float, show: Show) -> str:
    parts = []
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{y + 4:.1f}">{show(value)}</text>')
    return "".join(parts)


def _x_axis(ticks: Sequence[tuple[int, str]], count: int, axis: str, *, in_middle: bool = False) -> str:
    room = (WIDTH - LEFT - RIGHT) / count
    parts = [
        f'<text class="mid" x="{LEFT + (at + 0.5) * room if in_middle else _x(at, count):.1f}" '
        f'y="{HEIGHT - BOTTOM + 14}">{text}</text>'
        for at, text in ticks
    ]
    parts.append(f'<text class="mid" x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 4}">{axis}</text>')
    return "".join(parts)


def _index_ticks(count: int) -> list[tuple[int, str]]:
    step = max(1, -(-count // 12))
    return [(at, str(at)) for at in range(0, count, step)]


def _across(value: float, top: float, text: str = "") -> str:
    y = _y(value, top)
    line = f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if not text:
        return line
    return f'{line}<text class="end note" x="{WIDTH - RIGHT}" y="{y - 4:.1f}">{text}</text>'


def _x(at: int, count: int) -> float:
    return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * (at / (count - 1) if count > 1 else 0.5)


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


def _ceiling(value: float) -> float:
    """The next value above that four steps divide into round numbers."""
    return next((top for top in (0.2, 0.4, 0.6, 0.8) if value <= top), 1.0)


def _mark(index: int, x: float, y: float, colour: str, title: str) -> str:
    """One of eight shapes, so that colours are not all that tells lines apart."""
    shapes = ((0, 0), (4, 45), (4, 0), (3, -90), (3, 90), (5, 0), (6, 0), (3, 30))
    sides, turn = shapes[index % MARKS]
    words = f"<title>{escape(title)}</title>" if title else ""
    if not sides:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{words}</circle>'
    angles = np.radians(turn + np.arange(sides) * 360 / sides)
    points = " ".join(f"{x + 3.9 * np.cos(a):.1f},{y + 3.9 * np.sin(a):.1f}" for a in angles)
    return f'<polygon points="{points}" fill="{colour}">{words}</polygon>'
