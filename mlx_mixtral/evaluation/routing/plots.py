"""All figures of a routing analysis as one PNG; needs matplotlib, the extra ``plots``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mixtral.errors import MissingDependencyError
from mlx_mixtral.evaluation.routing.analysis import DomainRouting, RoutingAnalysis
from mlx_mixtral.evaluation.routing.excerpt import domain_colour
from mlx_mixtral.files import replace_file

__all__ = ["draw_routing", "plot_routing"]

MARKERS = "osD^vPXh"
MOST_WRITTEN = 8


def plot_routing(place: Path, found: RoutingAnalysis, layers: Sequence[int] | None = None) -> None:
    """Write a PNG: shares of experts and pairs for ``layers`` (first, middle, last when None), curves over all layers.

    Raises:
        MissingDependencyError: no matplotlib.
        DestinationError, DiskSpaceError: it cannot be written.
    """
    replace_file(place, draw_routing(found, layers))


def draw_routing(found: RoutingAnalysis, layers: Sequence[int] | None = None) -> bytes:
    """The PNG that ``plot_routing`` writes.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: `pip install 'mlx-mixtral[plots]'`") from error
    shown = found.shown_layers if layers is None else tuple(layers)
    columns = max(3, len(shown))
    figure = Figure(figsize=(4.6 * columns, 11.5), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    for row in axes:
        for unused in row:
            unused.set_visible(False)
    for column, layer in enumerate(shown):
        _shares(axes[0][column], found, layer)
    _curves(axes[1], found)
    if found.per_token > 1:
        for column, layer in enumerate(shown):
            _pairs(axes[2][column], found, layer)
    handles, names = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(9, len(names)))
    # A name may have dollars, which would begin a formula.
    figure.suptitle(f"{found.name or 'routing'}: {found.overall.tokens:,} tokens", parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    return image.getvalue()


def _shares(axes: Any, found: RoutingAnalysis, layer: int) -> None:
    width = 0.86 / len(found.domains)
    for index, domain in enumerate(found.domains.values()):
        places = np.arange(found.num_experts) + (index - (len(found.domains) - 1) / 2) * width
        shares, errors = domain.shares.value[layer], domain.shares.stderr[layer]
        axes.bar(places, shares, width * 0.92, color=domain_colour(index), yerr=errors, error_kw={"elinewidth": 0.6})
    axes.axhline(1 / found.num_experts, linestyle="--", color="grey", linewidth=1)
    axes.set(title=f"share of assignments, layer {layer}", xlabel="expert", ylim=(0, None))
    if found.num_experts <= MOST_WRITTEN * 2:
        axes.set_xticks(range(found.num_experts))
    _finish(axes, percent=True)


def _curves(axes: Sequence[Any], found: RoutingAnalysis) -> None:
    kinds: list[tuple[str, str, float | None]] = [("repeated first choice", "repeats_first", found.chance_first)]
    if found.per_token > 1:
        kinds.append(("an expert in common with the token before", "repeats_either", found.chance_either))
    if found.overall.entropy is not None and found.num_experts > 1:
        kinds.append(("entropy of the gate, bits", "entropy", None))
    for place, (title, attribute, chance) in zip(axes, kinds, strict=False):
        for index, (name, domain) in enumerate(found.domains.items()):
            _curve(place, name, index, domain, attribute)
        if chance is not None:
            place.axhline(chance, linestyle="--", color="grey", linewidth=1)
        place.set(title=title, xlabel="layer", ylim=(0, 1 if chance is not None else np.log2(found.num_experts)))
        place.xaxis.get_major_locator().set_params(integer=True)
        _finish(place, percent=chance is not None)


def _curve(axes: Any, name: str, index: int, domain: DomainRouting, attribute: str) -> None:
    estimate = getattr(domain, attribute)
    axes.errorbar(
        np.arange(len(estimate.value)),
        estimate.value,
        estimate.stderr,
        color=domain_colour(index),
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        linewidth=1.3,
        label=name.replace("$", r"\$"),
    )


def _pairs(axes: Any, found: RoutingAnalysis, layer: int) -> None:
    lift = found.overall.clear_lift[layer]
    with np.errstate(divide="ignore", invalid="ignore"):
        axes.imshow(np.clip(np.log2(lift), -2, 2), cmap="PuOr", vmin=-2, vmax=2)
    if found.num_experts <= MOST_WRITTEN:
        for row, column in np.argwhere(np.isfinite(lift)):
            value = lift[row, column]
            colour = "black" if 0.45 < value < 2.2 else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(found.num_experts))
        axes.set_yticks(range(found.num_experts))
    axes.set(title=f"pairs over chance, layer {layer}", xlabel="expert", ylabel="expert", visible=True)


def _finish(axes: Any, *, percent: bool) -> None:
    axes.set_visible(True)
    axes.grid(alpha=0.3, axis="y")
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
