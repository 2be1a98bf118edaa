"""Plots of an evaluation as PNG files; needs matplotlib, the extra ``plots``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import MissingDependencyError
from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.results import LengthBucket
from mlx_mixtral.files import replace_file

__all__ = ["check_plotting", "plot_long_context"]


def check_plotting() -> None:
    """Raise MissingDependencyError where there is no matplotlib."""
    _figure()


def plot_long_context(place: Path, title: str, passkeys: PasskeyResult | None, buckets: list[LengthBucket]) -> None:
    """Write a PNG: the passkey heat map and perplexity by length of context, whichever there are, as in Mixtral's figure 4.

    Raises:
        MissingDependencyError: no matplotlib.
        DestinationError, DiskSpaceError: it cannot be written.
    """
    shown = (passkeys is not None) + bool(buckets)
    figure = _figure()(figsize=(1 + 5.2 * shown, 4), layout="constrained")
    axes = figure.subplots(1, shown, squeeze=False)[0]
    if passkeys is not None:
        _heat_map(axes[0], passkeys)
    if buckets:
        _curve(axes[-1], buckets)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    replace_file(place, image.getvalue())


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


def _curve(axes: Any, buckets: list[LengthBucket]) -> None:
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


def _figure() -> Any:
    try:
        # The object, not pyplot: no window system is asked for, and no state outlives the plot.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: `pip install 'mlx-mixtral[plots]'`") from error
    return Figure
