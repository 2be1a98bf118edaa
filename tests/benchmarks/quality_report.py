"""The rows of ``quality.py`` as lines, tables and a plot."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

Row = dict[str, Any]
# What is compared with a row: mlx-lm's rows of its size. The router, 16 bits here and packed by mlx-lm, makes the difference.
SMALLER, LARGER = 0.02, 0.2
KIND_ROWS = (2.5, 3, 3.5, 4.5)
"""Bits per weight at which the best rows are taken apart."""


def line(row: Row) -> str:
    if "kl" not in row and "seconds" not in row:
        return f"{row['name']:<44} " + (
            f"failed: {row['failed']}" if "failed" in row else f"left out: {row['left_out']}"
        )
    size = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else ""
    quality = f"{row['bits']:>7.3f}{row['kl']:>10.5f}" if "kl" in row else f"{'':>17}"
    return f"{row['name']:<44}{quality}{row['seconds']:>7.1f} s{size:>9}"


def rival(row: Row, results: list[Row]) -> Row | None:
    """The best row of mlx-lm's that is as large as ``row``, or a little larger."""
    near = [
        other
        for other in results
        if other["name"].startswith("mlx-lm") and "kl" in other and -SMALLER <= other["bits"] - row["bits"] <= LARGER
    ]
    return min(near, key=lambda other: other["kl"], default=None)


def front(results: list[Row], start: str) -> list[Row]:
    """Ascending in bits and descending in KL: rows of that name than which no smaller one is better."""
    kept: list[Row] = []
    for row in sorted((row for row in results if row["name"].startswith(start) and "kl" in row), key=_size):
        if not kept or row["kl"] < kept[-1]["kl"]:
            kept.append(row)
    return kept


def _size(row: Row) -> tuple[float, float]:
    return row["bits"], row["kl"]


def interpolated(curve: list[Row], bits: float) -> float | None:
    """KL at a size between two rows of ``curve``, its logarithm linear in bits; None outside of it."""
    for low, high in pairwise(curve):
        if low["bits"] <= bits <= high["bits"]:
            share = (bits - low["bits"]) / (high["bits"] - low["bits"])
            return exp(log(low["kl"]) * (1 - share) + log(high["kl"]) * share)
    return None


def markdown(results: list[Row]) -> str:
    lines = ["| | bits | KL | time | peak memory | to the best of mlx-lm |", "|---|---:|---:|---:|---:|---:|"]
    for row in results:
        if (reason := row.get("failed") or row.get("left_out")) is not None:
            lines.append(f"| {row['name']} | {'failed' if 'failed' in row else 'left out'}: {reason} | | | | |")
            continue
        bits, kl = (f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("bits", 3), ("kl", 5)))
        other = rival(row, results) if row["name"].startswith("ours") and "kl" in row else None
        ratio = f"{row['kl'] / other['kl']:.2f}" if other else ""
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else ""
        lines.append(f"| {row['name']} | {bits} | {kl} | {row['seconds']:.1f} s | {memory} | {ratio} |")
    return "\n".join(lines)


def against_llama(results: list[Row]) -> str:
    """Each of llama.cpp's files, and ours at its size."""
    curve = front(results, "ours")
    lines = ["| | file: bits | divergence | ours at that size | ratio | its types |", "|---|---:|---:|---:|---:|---|"]
    theirs = [row for row in results if row["name"].startswith("llama.cpp") and "kl" in row]
    for row in sorted(theirs, key=_size):
        ours = interpolated(curve, row["bits"])
        ratio = f"{ours:.5f} | {ours / row['kl']:.2f}" if ours else " | "
        types = ", ".join(f"{kind} {share:.0%}" for kind, share in row["types"].items() if share >= 0.005)
        lines.append(f"| {row['name']} | {row['bits']:.3f} | {row['kl']:.5f} | {ratio} | {types} |")
    return "\n".join(lines)


def kinds_table(results: list[Row]) -> str:
    """Bits and relative output error by kind of matrix, of the best of ours and of llama.cpp's up to some sizes.

    The error is that on the held-out text; after the slash, on the calibration text.
    """
    picked: list[Row] = []
    for bits in KIND_ROWS:
        for start in ("llama.cpp", "ours"):
            small = [row for row in front(results, start) if row["bits"] <= bits + SMALLER and "kinds" in row]
            picked += [row for row in small[-1:] if row not in picked]
    kinds = list(dict.fromkeys(kind for row in picked for kind in row["kinds"]))
    lines = [f"| bits, output error | all | {' | '.join(kinds)} |", f"|---|---:|{'---:|' * len(kinds)}"]
    for row in picked:
        found = (row["kinds"].get(kind) for kind in kinds)
        cells = (f"{one['bits']:.2f}, {one['error']:.1%}/{one['error_learnt']:.1%}" if one else "" for one in found)
        lines.append(f"| {row['name']} | {row['bits']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predictions(results: list[Row]) -> str:
    """What ``convert`` predicts of fitted and calibrated rows, beside what was measured."""
    fitted = [row for row in results if row["name"].startswith("ours fit") and row.get("predicted") and "kl" in row]
    known = [row for row in fitted if not row["name"].endswith("built-in")]
    if len(known) < 2:
        return "no predictions to compare"
    ratios = [row["predicted"] / row["kl"] for row in known]
    middle = exp(sum(log(ratio) for ratio in ratios) / len(ratios))
    ranks = [
        {row["name"]: rank for rank, row in enumerate(sorted(known, key=lambda row: row[key]))}
        for key in ("predicted", "kl")
    ]
    apart = sum((ranks[0][row["name"]] - ranks[1][row["name"]]) ** 2 for row in known)
    correlation = 1 - 6 * apart / (len(known) * (len(known) ** 2 - 1))
    return (
        f"Predicted over measured KL of {len(known)} fitted rows: {middle:.2f}x on average (geometric), "
        f"{min(ratios):.2f}x to {max(ratios):.2f}x; Spearman's rank correlation {correlation:.3f}."
    )


# Colour, marker and what its rows' names start with; mlx-lm's are cold and open, llama.cpp's green, ours warm and full.
FAMILIES = {
    "llama.cpp": ("#2e7d4f", "P"),
    "mlx-lm uniform": ("#1f3b73", "s"),
    "mlx-lm gptq": ("#2a7fb8", "^"),
    "mlx-lm dwq": ("#4bacc6", "v"),
    "mlx-lm dynamic_quant": ("#6b8e9f", "D"),
    "mlx-lm mixed": ("#9aa5b1", "X"),
    "ours plain": ("#7a5c3e", "s"),
    "ours search": ("#e0a030", "o"),
    "ours gptq": ("#e2672a", "^"),
    "ours fit": ("#b3123f", "*"),
}
LIMITS = 2.1, 4.95


def plot(results: list[Row], title: str, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = [row for row in results if "kl" in row and LIMITS[0] <= row["bits"] <= LIMITS[1]]
    for family, (colour, marker) in FAMILIES.items():
        points = [_size(row) for row in shown if row["name"].startswith(family)]
        if not points:
            continue
        ours = family.startswith("ours")
        axes.scatter(
            *zip(*points, strict=True),
            s=110 if marker == "*" else 45,
            marker=marker,
            facecolors=colour if ours or marker in "XP" else "none",
            edgecolors=colour,
            label=family,
            zorder=3 if ours else 2,
        )
        best = [_size(row) for row in front(shown, family)]
        axes.plot(*zip(*best, strict=True), color=colour, linewidth=1, alpha=0.5, linestyle="-" if ours else "--")
    axes.set(yscale="log", title=title, xlabel="bits per weight, scales included", ylabel="KL, nats per token")
    axes.grid(which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)
