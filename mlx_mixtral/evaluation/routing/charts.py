"""Charts of a routing analysis on matplotlib's axes, the same in the picture and in the page.

Each gives its marks: what its shapes stand for, in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.evaluation.figures import HIGH, LOW, PAPER, TEXT, Mark
from mlx_mixtral.evaluation.routing.analysis import Estimate, RoutingAnalysis
from mlx_mixtral.evaluation.routing.excerpt import domain_colour

__all__ = ["MAX_BARS", "MAX_STRENGTH", "draw_curves", "draw_map", "draw_pairs", "draw_shares", "line_look", "percent"]

MARKERS = "osD^vPXh"
DASHES = ("-", "--", ":", "-.")
MAX_BARS = 16
MAX_STRENGTH = 0.75
"""Opacity of the strongest colour of a map: text is read on it."""


def line_look(index: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the domain of this number: colours are not all that tells lines apart."""
    return domain_colour(index), MARKERS[index % len(MARKERS)], DASHES[index // len(MARKERS) % len(DASHES)]


def percent(value: float) -> str:
    """A share in words."""
    return f"{value:.1%}" if value and value < 0.9995 else f"{value:.0%}"


def draw_curves(axes: Any, curves: Mapping[str, Estimate], *, top: float, chance: float | None = None) -> list[Mark]:
    """A line for each name over the layers; with ``chance``, what random routing gives, they are shares."""
    marks: list[Mark] = []
    show = "{:.2f}".format if chance is None else percent
    for index, (name, curve) in enumerate(curves.items()):
        layers = np.flatnonzero(np.isfinite(curve.value))
        colour, marker, dashes = line_look(index)
        line, *_ = axes.errorbar(
            layers, curve.value[layers], curve.stderr[layers],
            color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.8, elinewidth=1,
        )  # fmt: skip
        marks.append((line, [f"{name}, layer {layer}: {show(curve.value[layer])}" for layer in layers]))
    _finish(axes, "layer", shares=chance is not None)
    axes.set_ylim(0, 1.03 * top)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if chance is not None:
        _across(axes, chance)
        box = {"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 1}
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"random {percent(chance)}", (1, chance), (0, 4), bbox=box, **place)
    return marks


def draw_shares(axes: Any, found: RoutingAnalysis, layer: int) -> list[Mark]:
    """For each expert of a layer a group of bars, one a domain, as the paper's figure 7."""
    marks: list[Mark] = []
    width = 0.86 / len(found.domains)
    for index, (name, domain) in enumerate(found.domains.items()):
        places = np.arange(found.num_experts) + (index - (len(found.domains) - 1) / 2) * width
        shares, errors = domain.shares.value[layer], domain.shares.stderr[layer]
        bars = axes.bar(
            places, shares, width * 0.92, color=domain_colour(index), yerr=errors,
            error_kw={"elinewidth": 0.6, "ecolor": TEXT},
        )  # fmt: skip
        marks += [
            (bar, [f"{name}, expert {expert}: {percent(shares[expert])}"]) for expert, bar in enumerate(bars.patches)
        ]
    _finish(axes, "expert", shares=True)
    _across(axes, 1 / found.num_experts)
    axes.set_ylim(bottom=0)
    if found.num_experts <= MAX_BARS:
        axes.set_xticks(range(found.num_experts))
    return marks


def draw_pairs(axes: Any, found: RoutingAnalysis, layer: int) -> list[Mark]:
    """How often experts are chosen together, over what chance gives."""
    lift, shares = found.overall.clear_lift[layer], found.overall.pairs.value[layer]
    is_small = found.num_experts <= MAX_BARS
    marks = draw_map(
        axes,
        lift,
        lambda a, b: f"{a} and {b}: {shares[a, b]:.2%} of tokens, {lift[a, b]:.2f} of chance",
        written=is_small,
    )
    axes.set(xlabel="expert", ylabel="expert", aspect="equal")
    if is_small:
        axes.set_xticks(range(found.num_experts))
        axes.set_yticks(range(found.num_experts))
    return marks


def draw_map(
    axes: Any, ratios: npt.NDArray[np.float64], show: Callable[[int, int], str], *, written: bool = False
) -> list[Mark]:
    """Cells ``[rows, columns]`` by their ratio to what is expected: none at 1, one colour above, another below.

    ``show`` says a cell in words; ``written`` puts the ratio into it.
    """
    from matplotlib.colors import to_rgba

    marks: list[Mark] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        strengths = MAX_STRENGTH * np.clip(np.abs(np.log2(ratios)) / 2, 0, 1)
    for row, values in enumerate(ratios):
        columns = np.flatnonzero(np.isfinite(values)).tolist()
        colours = [to_rgba(HIGH if values[at] >= 1 else LOW, strengths[row, at]) for at in columns]
        cells = axes.broken_barh([(at - 0.47, 0.94) for at in columns], (row - 0.47, 0.94), facecolors=colours)
        marks.append((cells, [show(row, at) for at in columns]))
        for at in columns if written else ():
            text = f"{values[at]:.1f}" if values[at] < 9.95 else "≥10"
            axes.text(at, row, text, ha="center", va="center", size="small")
    height, width = ratios.shape
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return marks


def _across(axes: Any, chance: float) -> None:
    axes.axhline(chance, linestyle="--", color=TEXT, linewidth=1)


def _finish(axes: Any, label: str, *, shares: bool) -> None:
    axes.set_xlabel(label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    if shares:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
