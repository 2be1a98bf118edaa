"""All figures of a routing analysis as one PNG; needs matplotlib, the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlx_mixtral.evaluation.figures import new_figure, png, style
from mlx_mixtral.evaluation.routing.analysis import Estimate, RoutingAnalysis
from mlx_mixtral.evaluation.routing.charts import draw_curves, draw_pairs, draw_shares

__all__ = ["draw_routing"]

MAX_LEGEND_COLUMNS = 9


def draw_routing(found: RoutingAnalysis, layers: Sequence[int] | None = None) -> bytes:
    """A PNG of shares and pairs for ``layers`` (first, middle, last when None), and curves over all layers.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    shown = found.shown_layers if layers is None else tuple(layers)
    kinds: list[tuple[str, Mapping[str, Estimate], float, float | None]] = [
        ("repeated first choice", found.repeats_first, 1, found.chance_first)
    ]
    if found.per_token > 1:
        kinds.append(("an expert in common with the previous token", found.repeats_either, 1, found.chance_either))
    if found.entropies:
        kinds.append(("entropy of the gate, bits", found.entropies, float(np.log2(found.num_experts)), None))
    columns = max(3, len(shown))
    with style():
        figure = new_figure(4.6 * columns, 11.5)
        rows = figure.subplots(3, columns, squeeze=False)
        for unused in rows.flat:
            unused.set_visible(False)
        for axes, layer in zip(rows[0], shown, strict=False):
            draw_shares(axes, found, layer)
            axes.set(title=f"share of assignments, layer {layer}", visible=True)
        for axes, (title, curves, top, chance) in zip(rows[1], kinds, strict=False):
            draw_curves(axes, curves, top=top, chance=chance)
            axes.set(title=title, visible=True)
        for axes, layer in zip(rows[2], shown if found.per_token > 1 else (), strict=False):
            draw_pairs(axes, found, layer)
            axes.set(title=f"pairs relative to chance, layer {layer}", visible=True)
        names = [name.replace("$", r"\$") for name in found.domains]  # a dollar would begin a formula
        place = "outside lower center"
        figure.legend(rows[1][0].containers, names, loc=place, ncols=min(MAX_LEGEND_COLUMNS, len(names)))
        return png(figure, f"{found.name or 'routing'}: {found.overall.tokens:,} tokens", dpi=110)
