"""A benchmark as a PNG; needs matplotlib, the extra ``plots``."""

from __future__ import annotations

from typing import Any

from mlx_mixtral.bench.measurements import BenchReport, Row
from mlx_mixtral.evaluation.figures import new_figure, png

__all__ = ["draw_bench"]

PANELS = (
    ("prefill", "prefill", "tokens of the prompt"),
    ("decode", "decode", "tokens of context"),
    ("batch", "batches, all rows together", "rows"),
)


def draw_bench(title: str, report: BenchReport) -> bytes:
    """A PNG of tok/s of every backend by length of prompt, depth of context and rows.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    panels = [(name, label, rows) for kind, name, label in PANELS if (rows := report.of(kind))]
    figure = new_figure(1 + 4.2 * len(panels), 4)
    for axes, (name, label, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, report.backends, rows)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(label)
    return png(figure, title)


def _draw(axes: Any, backends: list[str], rows: list[Row]) -> None:
    for name in backends:
        measured = sorted((row for row in rows if row.timings[name]), key=lambda row: row.case.size)
        if not measured:
            continue
        rates = [row.tok_s(name) for row in measured]
        errors = [[rate.median - rate.low for rate in rates], [rate.high - rate.median for rate in rates]]
        sizes = [row.case.size for row in measured]
        axes.errorbar(sizes, [r.median for r in rates], errors, marker="o", markersize=4, capsize=3, label=name)
    sizes = sorted({row.case.size for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tok/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
