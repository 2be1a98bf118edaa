"""A routing analysis as one HTML page: nothing is fetched, no script runs, every name and text in it is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.evaluation.figures import Mark, inline_svg
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis
from mlx_mixtral.evaluation.routing.charts import (
    MAX_BARS,
    draw_curves,
    draw_map,
    draw_pairs,
    draw_shares,
    line_look,
    percent,
)
from mlx_mixtral.evaluation.routing.excerpt import Excerpt
from mlx_mixtral.evaluation.routing.excerpt_page import coloured_text
from mlx_mixtral.evaluation.routing.published import PUBLISHED_MODEL
from mlx_mixtral.evaluation.routing.repeats import repeat_tables, with_percent
from mlx_mixtral.evaluation.routing.style import STYLE
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS

__all__ = ["routing_page"]

PAPER = '<a href="https://arxiv.org/abs/2401.04088">Mixtral of Experts</a>'
SHOWN_PAIRS = 4
SIGNS = dict(zip("osD^vPXh", "●■◆▲▼✚✖⬢", strict=True)) | {"-": "─", "--": "╌", ":": "┈", "-.": "┄"}
"""How a legend writes markers and dashes."""

Floats = npt.NDArray[np.float64]


def routing_page(found: RoutingAnalysis, excerpts: Sequence[Excerpt], layers: Sequence[int] | None = None) -> str:
    """The whole page; ``layers`` (first, middle, last when None) are shown one by one."""
    shown = found.shown_layers if layers is None else tuple(layers)
    name = escape(found.name or "Routing")
    sections = [
        _summary(found),
        _repeats(found, shown),
        _shares(found, shown),
        _pairs(found, shown),
        _entropy(found),
        coloured_text(excerpts, shown, found.num_experts),
        _method(found),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{name}: routing</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{name}</h1><p>What the experts do: the routing analysis of {PAPER}, section 5.</p></header>\n"
        + "\n".join(section for section in sections if section)
        + "</main></body></html>\n"
    )


def _summary(found: RoutingAnalysis) -> str:
    overall = found.overall
    first, either = overall.repeats_first.value, overall.repeats_either.value
    cards = [
        (f"{overall.tokens:,}", f"tokens of {len(found.domains)} domain{'s' * (len(found.domains) != 1)}"),
        (f"{found.per_token} of {found.num_experts}", f"experts per token, {found.layers} layers"),
        (
            percent(float(np.mean(first))),
            f"repeat the first choice of the previous token; random routing {found.chance_first:.1%}",
        ),
    ]
    if found.per_token > 1:
        cards.append(
            (
                percent(float(np.mean(either))),
                f"share an expert with the previous token; random routing {found.chance_either:.1%}",
            )
        )
    used = overall.effective_experts
    cards.append((f"{used.min():.1f}–{used.max():.1f}", f"experts in effective use, by layer, of {found.num_experts}"))
    items = "".join(f"<div><b>{value}</b><span>{words}</span></div>" for value, words in cards)
    return f'<div class="cards">{items}</div>'


def _repeats(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    kinds = [("First choice", found.repeats_first, found.chance_first)]
    if found.per_token > 1:
        words = "First or second choice" if found.per_token == 2 else f"Any of {found.per_token} choices"
        kinds.append((words, found.repeats_either, found.chance_either))
    charts = [
        _chart(words, f"{words}, repeats by layer", partial(draw_curves, curves=curves, top=1.0, chance=chance))
        for words, curves, chance in kinds
    ]
    tables = [
        _table(table.title, table.columns, table.rows, theirs=2 + len(layers)) for table in repeat_tables(found, layers)
    ]
    return _section(
        "repeats",
        "Repeats from token to token",
        "How often a token gets the same expert as the previous token, by layer (the paper's figure 10 and table 5). "
        "The dashed line is what random routing would give.",
        _legend(found) + _charts(charts) + "".join(tables),
    )


def _shares(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    even, body = 1 / found.num_experts, ""
    if found.num_experts <= MAX_BARS:
        bars = [
            _chart(
                f"Layer {layer}", f"Shares of experts in layer {layer}", partial(draw_shares, found=found, layer=layer)
            )
            for layer in layers
        ]
        body += _legend(found) + _charts(bars)
    height = 45 + int(found.layers * max(5, min(16, 165 / found.layers)))
    maps = [
        _chart(
            name,
            f"Shares of experts by layer, {name}",
            partial(_share_map, shares=domain.shares.value),
            size=(190, height),
        )
        for name, domain in found.rows.items()
    ]
    body += (
        "<h3>All layers</h3><p><span class='key hi'></span> more than a uniform share, <span class='key lo'></span> less; "
        f"full colour is four times {even:.1%}, or a quarter of it.</p>{_charts(maps, kind='charts small')}"
    )
    if found.num_experts <= MAX_BARS:
        tables = [
            _table(f"Layer {layer}", ["domain", *map(str, range(found.num_experts))], [
                [name, *(with_percent(domain.shares, (layer, expert)) for expert in range(found.num_experts))]
                for name, domain in found.rows.items()
            ])
            for layer in layers
        ]  # fmt: skip
        body += f"<details><summary>The numbers, with standard errors</summary>{''.join(tables)}</details>"
    return _section(
        "shares",
        "Shares of experts",
        "The share of all assignments that each expert gets, counting first and second choices equally (the paper's figure 7). "
        f"The dashed line is a uniform share, {even:.1%}. Mixtral 8x7B stays close to it in most domains: its experts do not "
        "specialise in topics.",
        body,
    )


def _share_map(axes: Any, shares: Floats) -> list[Mark]:
    axes.set(xlabel="expert", ylabel="layer")
    return draw_map(axes, shares * shares.shape[1], lambda row, at: f"layer {row}, expert {at}: {shares[row, at]:.1%}")


def _pairs(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    if found.per_token < 2:
        return ""
    charts = []
    for layer in layers:
        shares = found.overall.pairs.value[layer]
        pairs = found.overall.clear_pairs(layer)[:SHOWN_PAIRS]
        most = ", ".join(f"{a}+{b} ({shares[a, b]:.1%} of tokens)" for a, b in pairs)
        draw = partial(draw_pairs, found=found, layer=layer)
        below = f"<p>Most: {most}</p>" if most else ""
        charts.append(
            _chart(f"Layer {layer}", f"Pairs of experts in layer {layer}", draw, size=(380, 370), below=below)
        )
    return _section(
        "pairs",
        "Experts that work together",
        "How often two experts are chosen for the same token, relative to chance for experts used this often: "
        "1 is chance, 2 is twice as often. Cells are empty where chance would give fewer than 20 tokens.",
        _charts(charts),
    )


def _entropy(found: RoutingAnalysis) -> str:
    if not (curves := found.entropies):
        return ""
    most = float(np.log2(found.num_experts))
    chart = _chart("Entropy, bits", "Entropy of the gate by layer", partial(draw_curves, curves=curves, top=most))
    return _section(
        "entropy",
        "How confident the gate is",
        f"Mean entropy, in bits, of the gate's softmax over all {found.num_experts} experts: 0 if one expert gets everything, "
        f"{most:.2f} if all are equally likely.",
        _legend(found) + _charts([chart]),
    )


def _method(found: RoutingAnalysis) -> str:
    return _section(
        "method",
        "How this was measured",
        "",
        "<ul><li>Every token of the texts except BOS counts once; texts longer than a window are split, each "
        "window begins with BOS, and no pair of consecutive tokens spans two windows.</li>"
        f"<li>± is one standard error, over blocks of {BLOCK_TOKENS} consecutive tokens, because neighbours are routed "
        "alike.</li><li>Chance for pairs is quasi-independence: each expert is used as often as it was, and "
        "never together with itself.</li><li>The number of effective experts is two to the power of the entropy of the "
        f"shares.</li><li>The figures of {PUBLISHED_MODEL} are from the paper's table 5, for parts of The Pile with "
        "similar names; other texts give other figures.</li></ul>",
    )


def _section(name: str, title: str, words: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{f"<p>{words}</p>" if words else ""}{body}</section>'


def _chart(
    caption: str,
    title: str,
    draw: Callable[[Any], Sequence[Mark]],
    *,
    size: tuple[int, int] = (380, 230),
    below: str = "",
) -> str:
    svg = inline_svg(draw, title, *size)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}{below}</figure>"


def _charts(charts: Iterable[str], kind: str = "charts") -> str:
    return f'<div class="{kind}">{"".join(charts)}</div>'


def _legend(found: RoutingAnalysis) -> str:
    """The lines and marks of charts, by name."""
    items = []
    for index, name in enumerate(found.domains):
        colour, marker, dashes = line_look(index)
        items.append(
            f'<li><i style="color:{colour}">{SIGNS[dashes]}{SIGNS[marker]}{SIGNS[dashes]}</i>{escape(name)}</li>'
        )
    return f'<ul class="legend" aria-label="domains">{"".join(items)}</ul>'


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, theirs: int | None = None) -> str:
    """Cells are text; from column ``theirs`` on they are the paper's."""

    def kind(index: int) -> str:
        return ' class="theirs"' if theirs is not None and index >= theirs else ""

    head = "".join(f'<th scope="col"{kind(at)}>{escape(name)}</th>' for at, name in enumerate(columns))
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind(at)}>{_cell(cell)}</td>" for at, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, sign, error = escape(text).partition(" ± ")
    return f"{value} <small>± {error}</small>" if sign else value
