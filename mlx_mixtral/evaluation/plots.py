"""Plots of an evaluation as PNG; needs matplotlib, the extra ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_mixtral.evaluation.figures import new_figure, png
from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.results import Evaluation, LengthBucket

__all__ = ["draw_domains", "draw_long_context"]

OWN, THEIRS = "#4477AA", "#BBBBBB"


def draw_long_context(title: str, passkeys: PasskeyResult | None, buckets: Sequence[LengthBucket]) -> bytes:
    """A PNG of the passkey heat map and perplexity by length of context, whichever there are, as in Mixtral's figure 4.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    shown = (passkeys is not None) + bool(buckets)
    figure = new_figure(1 + 5.2 * shown, 4)
    axes = figure.subplots(1, shown, squeeze=False)[0]
    if passkeys is not None:
        _heat_map(axes[0], passkeys)
    if buckets:
        _curve(axes[-1], buckets)
    return png(figure, title)


def draw_domains(title: str, reference: str | None, found: Evaluation) -> bytes:
    """A PNG of perplexity by domain, beside the reference's where there is one, and of the mean KL to it.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    rows = found.rows
    compared = {name: score.comparison for name, score in rows.items() if score.comparison is not None}
    panels = 2 if compared else 1
    figure = new_figure(1 + 5.2 * panels, 1.6 + 0.36 * len(rows))
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    places, width = range(len(rows)), 0.4 if compared else 0.7
    own = [place - width / 2 for place in places] if compared else list(places)
    scores = list(rows.values())
    errors = [score.perplexity_stderr for score in scores]
    axes[0].barh(own, [score.perplexity for score in scores], width, xerr=errors, color=OWN, label="this model")
    if compared:
        theirs = [row.reference_perplexity for row in compared.values()]
        axes[0].barh([place + width / 2 for place in places], theirs, width, color=THEIRS, label="reference")
        axes[0].legend(fontsize=8)
        errors = [row.kl_stderr for row in compared.values()]
        axes[1].barh(list(places), [row.kl_mean for row in compared.values()], 0.7, xerr=errors, color=OWN)
        axes[1].set_title("mean KL to the reference, nats per token", fontsize=10)
        axes[1].grid(alpha=0.3, axis="x")
    axes[0].set_yticks(places, list(rows), parse_math=False)
    axes[0].invert_yaxis()
    axes[0].set_title("perplexity", fontsize=10)
    axes[0].grid(alpha=0.3, axis="x")
    return png(figure, f"{title} compared with {reference}" if reference else title)


def _heat_map(axes: Any, result: PasskeyResult) -> None:
    cells = [list(column) for column in zip(*result.found, strict=True)]  # [depth][length]
    axes.imshow(cells, cmap="RdYlGn", vmin=-0.4, vmax=1.4, aspect="auto")  # lighter than its ends
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(result.lengths)), [str(length) for length in result.lengths])
    axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title("passkeys found", fontsize=10)


def _curve(axes: Any, buckets: Sequence[LengthBucket]) -> None:
    ends = [bucket.high for bucket in buckets]
    errors = [bucket.perplexity_stderr for bucket in buckets]
    axes.errorbar(ends, [bucket.perplexity for bucket in buckets], errors, marker="o", markersize=4, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [str(end) for end in ends])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context, up to")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.set_title("perplexity by length of context", fontsize=10)
