"""Tables of a routing analysis: repeats beside the paper's, shares, curves over layers, pairs, and coloured text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mlx_mixtral.cli.console import out_console, print_table, terminal_safe
from mlx_mixtral.evaluation.routing.analysis import Estimate, RoutingAnalysis
from mlx_mixtral.evaluation.routing.excerpt import Excerpt, expert_colour
from mlx_mixtral.evaluation.routing.repeats import repeat_tables
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS

__all__ = ["print_excerpts", "print_routing"]

BARS = "▁▂▃▄▅▆▇█"
MAX_PAIRS = 3
MAX_EXPERTS = 16
WIDE = 104
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Floats = npt.NDArray[np.float64]


def print_routing(found: RoutingAnalysis, layers: Sequence[int]) -> None:
    """Everything but text; ``layers`` are shown one by one, the others as curves."""
    console = out_console()
    of = f"{found.layers} layers, {found.per_token} of {found.num_experts} experts per token"
    console.print(f"{terminal_safe(found.name or 'routing')}: {found.overall.tokens:,} tokens, {of}\n", soft_wrap=True)
    _repeats(found, layers)
    _shares(found, layers)
    _curves(found)
    _pairs(found, layers)
    hint = "" if console.width >= WIDE else "; a wider terminal shows more layers"
    console.print(f"± is one standard error, over blocks of {BLOCK_TOKENS} tokens{hint}", style="dim", soft_wrap=True)


def _repeats(found: RoutingAnalysis, layers: Sequence[int]) -> None:
    # Standard errors are what a narrow terminal can do without.
    is_wide = out_console().width >= WIDE + 13 * (len(layers) - 3)
    for table in repeat_tables(found, layers, with_details=is_wide):
        print_table(table.title, table.columns, table.rows)


def _shares(found: RoutingAnalysis, layers: Sequence[int]) -> None:
    """Figure 7."""
    console = out_console()
    if found.num_experts > MAX_EXPERTS:
        console.print(f"Shares of {found.num_experts} experts: --json, --plot and --html show them\n", style="dim")
        return
    even = 1 / found.num_experts
    for layer in layers:
        title = f"Share of assignments to each expert, layer {layer} (figure 7; uniform {even:.1%})"
        rows = []
        for name, domain in found.rows.items():
            shares, errors = domain.shares.value[layer], domain.shares.stderr[layer]
            worst = f"{100 * errors.max():.1f}" if np.isfinite(errors).all() else ""
            rows.append([name, *(f"{100 * share:.1f}" for share in shares), worst])
        print_table(title, ["%", *map(str, range(found.num_experts)), "± up to"], rows)


def _curves(found: RoutingAnalysis) -> None:
    """Figure 10 and the gate's entropy, a line a domain."""
    _curve("Repeated first choice by layer (figure 10)", found, {n: d.repeats_first for n, d in found.rows.items()})
    if found.per_token > 1:
        either = {name: domain.repeats_either for name, domain in found.rows.items()}
        _curve("An expert in common with the previous token, by layer (figure 10)", found, either)
    entropies = {name: domain.entropy for name, domain in found.rows.items() if domain.entropy is not None}
    if entropies:
        highest = float(np.log2(found.num_experts))
        _curve(f"Entropy of the gate by layer, in bits of at most {highest:.2f}", found, entropies, bits=True)


def _curve(title: str, found: RoutingAnalysis, curves: dict[str, Estimate], *, bits: bool = False) -> None:
    everything = np.concatenate([curve.value for curve in curves.values()])
    finite = everything[np.isfinite(everything)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    rows = []
    for name, curve in curves.items():
        values = curve.value
        if not np.isfinite(values).all():
            continue
        lowest, highest = int(values.argmin()), int(values.argmax())
        show = "{:.2f}".format if bits else "{:.1%}".format
        rows.append(
            [
                name,
                _sparkline(values, low, high),
                show(values.mean()),
                f"{show(values[lowest])} ({lowest})",
                f"{show(values[highest])} ({highest})",
            ]
        )
    print_table(
        title, ["domain", f"layers 0–{found.layers - 1}", "mean", "lowest (layer)", "highest (layer)"], rows, left=2
    )


def _sparkline(values: Iterable[float], low: float, high: float) -> str:
    span = max(high - low, 1e-9)
    return "".join(BARS[min(7, int(8 * (value - low) / span))] for value in values)


def _pairs(found: RoutingAnalysis, layers: Sequence[int]) -> None:
    """The pairs that meet most and least, against what their shares would give by chance."""
    if found.per_token < 2:
        return
    rows = []
    for layer in layers:
        lift, shares = found.overall.pair_lift[layer], found.overall.pairs.value[layer]
        pairs = found.overall.clear_pairs(layer)
        shown = [
            ", ".join(f"{a}+{b} {lift[a, b]:.2f}x ({shares[a, b]:.1%})" for a, b in some)
            for some in (pairs[:MAX_PAIRS], pairs[::-1][: MAX_PAIRS - 1])
        ]
        rows.append([str(layer), *shown])
    title = "Pairs of experts chosen together more and less often than their shares predict (share of tokens)"
    print_table(title, ["layer", "most often", "least often"], rows, left=3)


def print_excerpts(excerpts: Sequence[Excerpt], layers: Sequence[int], num_experts: int) -> None:
    """Figure 8: tokens coloured by first choice, a line for each layer; without colours its number follows every run."""
    from rich.style import Style
    from rich.text import Text

    console = out_console()
    if not excerpts:
        return
    has_colours = console.is_terminal and not console.no_color
    console.print("Text coloured by first choice (figure 8)", style="bold")
    legend = Text("  expert ")
    for expert in range(min(num_experts, MAX_EXPERTS)):
        legend.append(f" {expert} ", Style(color="black", bgcolor=expert_colour(expert, num_experts)))
    if has_colours:
        console.print(legend)
    for excerpt in excerpts:
        console.print(terminal_safe(excerpt.domain), style="bold")
        for layer in layers:
            line = Text(f"{layer:>4} ", style="dim")
            chosen = excerpt.experts[:, layer].tolist()
            for index, (piece, expert) in enumerate(zip(excerpt.pieces, chosen, strict=True)):
                style = Style(color="black", bgcolor=expert_colour(expert, num_experts))
                line.append(terminal_safe(piece.replace("\n", "⏎").replace("\t", "→")), style)
                if not has_colours and (index + 1 == len(chosen) or chosen[index + 1] != expert):
                    line.append(str(expert).translate(SUPERSCRIPTS), style)
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
    console.print()
