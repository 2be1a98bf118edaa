"""A routing analysis as one HTML page: nothing is fetched, no script runs, every name and text in it is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mlx_mixtral.evaluation.routing.analysis import ALL, Estimate, RoutingAnalysis
from mlx_mixtral.evaluation.routing.excerpt import Excerpt
from mlx_mixtral.evaluation.routing.excerpt_page import coloured_text
from mlx_mixtral.evaluation.routing.published import PUBLISHED_LAYERS, PUBLISHED_MODEL, mean_published, published_for
from mlx_mixtral.evaluation.routing.style import STYLE
from mlx_mixtral.evaluation.routing.svg import bar_chart, grid_chart, legend, line_chart
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS

__all__ = ["routing_page"]

PAPER = '<a href="https://arxiv.org/abs/2401.04088">Mixtral of Experts</a>'
MOST_BARS = 16
SHOWN_PAIRS = 4


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
        f"<header><h1>{name}</h1><p>What its experts do: the routing analysis of {PAPER}, section 5.</p></header>\n"
        + "\n".join(section for section in sections if section)
        + "</main></body></html>\n"
    )


def _summary(found: RoutingAnalysis) -> str:
    overall = found.overall
    first, either = overall.repeats_first.value, overall.repeats_either.value
    cards = [
        (f"{overall.tokens:,}", f"tokens of {len(found.domains)} domain{'s' * (len(found.domains) != 1)}"),
        (f"{found.per_token} of {found.num_experts}", f"experts a token, {found.layers} layers"),
        (_show(float(np.mean(first))), f"repeat the first choice of the token before; random {found.chance_first:.1%}"),
    ]
    if found.per_token > 1:
        cards.append(
            (_show(float(np.mean(either))), f"share an expert with the token before; random {found.chance_either:.1%}")
        )
    used = overall.effective_experts
    cards.append((f"{used.min():.1f}–{used.max():.1f}", f"experts in effective use, by layer, of {found.num_experts}"))
    items = "".join(f"<div><b>{value}</b><span>{words}</span></div>" for value, words in cards)
    return f'<div class="cards">{items}</div>'


def _repeats(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    kinds = [("First choice", "first", found.chance_first, found.num_experts == 8)]
    if found.per_token > 1:
        words = "First or second choice" if found.per_token == 2 else f"Any of {found.per_token} choices"
        kinds.append((words, "either", found.chance_either, (found.num_experts, found.per_token) == (8, 2)))
    charts, tables = [], []
    for words, kind, chance, comparable in kinds:
        curves = {name: _repeat(found, name, kind).value for name in found.domains}
        charts.append(
            _figure(words, line_chart(curves, f"{words}, repeats by layer", _show, _tick, top=1.0, chance=chance))
        )
        tables.append(_repeat_table(found, layers, words, kind, chance, comparable))
    return _section(
        "repeats",
        "Repeats from token to token",
        "How often a token gets the expert of the token before it, by layer (the paper's figure 10 and table 5). "
        "Where routing were random it would be the dashed line.",
        legend(list(found.domains)) + f'<div class="charts">{"".join(charts)}</div>' + "".join(tables),
    )


def _repeat(found: RoutingAnalysis, name: str, kind: str) -> Estimate:
    domain = found.rows[name]
    return domain.repeats_first if kind == "first" else domain.repeats_either


def _repeat_table(
    found: RoutingAnalysis, layers: Sequence[int], words: str, kind: str, chance: float, comparable: bool
) -> str:
    columns = ["domain", "tokens", *(f"layer {layer}" for layer in layers)]
    if comparable:
        columns += [PUBLISHED_MODEL, *(f"layer {layer}" for layer in PUBLISHED_LAYERS)]
    rows = []
    for name, domain in found.rows.items():
        estimate = _repeat(found, name, kind)
        row = [escape(name), f"{domain.tokens:,}", *(_percent(estimate, (layer,)) for layer in layers)]
        if comparable:
            other = mean_published() if name == ALL and len(found.domains) > 1 else published_for(name)
            figures = () if other is None else (other.first if kind == "first" else other.either)
            row += ["", "", "", ""] if other is None else [other.domain, *(f"{figure:.1%}" for figure in figures)]
        rows.append(row)
    rows.append(["random", "", *[f"{chance:.1%}" for _ in layers], *([""] * 4 if comparable else [])])
    beside = f", beside the paper's figures for {PUBLISHED_MODEL}" if comparable else ""
    return _table(f"{words}{beside}", columns, rows, theirs=2 + len(layers))


def _shares(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    even, body = 1 / found.num_experts, ""
    if found.num_experts <= MOST_BARS:
        charts = [
            _figure(
                f"Layer {layer}",
                bar_chart(
                    {name: domain.shares.value[layer] for name, domain in found.domains.items()},
                    f"Shares of experts in layer {layer}",
                    _show,
                    _tick,
                    chance=even,
                ),
            )
            for layer in layers
        ]
        body += legend(list(found.domains)) + f'<div class="charts">{"".join(charts)}</div>'
    maps = []
    for name, domain in found.rows.items():
        shares = domain.shares.value
        chart = grid_chart(
            shares / even,
            f"Shares of experts by layer, {name}",
            lambda row, column, shares=shares: f"layer {row}, expert {column}: {shares[row, column]:.1%}",  # type: ignore[misc]
            rows="layer",
            columns="expert",
            cell=max(9.0, min(32.0, 330 / found.layers)),
            written=False,
            text_size=18,
        )
        maps.append(_figure(escape(name), chart))
    body += (
        "<h3>All layers</h3><p><span class='key hi'></span> more than a uniform share, <span class='key lo'></span> less; "
        f"full colour is four times {even:.1%}, or a quarter of it.</p><div class='charts small'>{''.join(maps)}</div>"
    )
    if found.num_experts <= MOST_BARS:
        tables = []
        for layer in layers:
            rows = [
                [escape(name), *(_percent(domain.shares, (layer, expert)) for expert in range(found.num_experts))]
                for name, domain in found.rows.items()
            ]
            tables.append(_table(f"Layer {layer}", ["domain", *map(str, range(found.num_experts))], rows))
        body += f"<details><summary>The numbers, with standard errors</summary>{''.join(tables)}</details>"
    return _section(
        "shares",
        "Shares of experts",
        "The part of all assignments, first or second choice alike, that each expert gets (the paper's figure 7). The dashed "
        f"line is a uniform share, {even:.1%}. Mixtral 8x7B stays close to it in most domains: its experts are no specialists "
        "for topics.",
        body,
    )


def _pairs(found: RoutingAnalysis, layers: Sequence[int]) -> str:
    if found.per_token < 2:
        return ""
    charts = []
    for layer in layers:
        lift, shares = found.overall.clear_lift[layer], found.overall.pairs.value[layer]
        chart = grid_chart(
            lift,
            f"Pairs of experts in layer {layer}",
            lambda a, b, lift=lift, shares=shares: (
                f"{a} and {b}: {shares[a, b]:.2%} of tokens, {lift[a, b]:.2f} of chance"
            ),  # type: ignore[misc]
            rows="expert",
            columns="expert",
            cell=330 / found.num_experts,
            written=found.num_experts <= MOST_BARS,
        )
        pairs = found.overall.clear_pairs(layer)[:SHOWN_PAIRS]
        most = ", ".join(f"{a}+{b} ({shares[a, b]:.1%} of tokens)" for a, b in pairs)
        charts.append(_figure(f"Layer {layer}", chart + (f"<p>Most: {most}</p>" if most else "")))
    return _section(
        "pairs",
        "Experts that work together",
        "How often two experts are chosen for the same token, over what chance would give experts used as often as these: 1 is "
        "chance, 2 twice as often. Cells are empty where chance would give fewer than 20 tokens.",
        f'<div class="charts">{"".join(charts)}</div>',
    )


def _entropy(found: RoutingAnalysis) -> str:
    curves = {name: domain.entropy.value for name, domain in found.domains.items() if domain.entropy is not None}
    if not curves or found.num_experts == 1:
        return ""
    most = float(np.log2(found.num_experts))
    chart = line_chart(curves, "Entropy of the gate by layer", "{:.2f}".format, "{:.2f}".format, top=most)
    return _section(
        "entropy",
        "How sure the gate is",
        f"Mean entropy, in bits, of the gate's softmax over all {found.num_experts} experts: 0 where one expert takes all, "
        f"{most:.2f} where all are alike.",
        legend(list(found.domains)) + f'<div class="charts">{_figure("Entropy, bits", chart)}</div>',
    )


def _method(found: RoutingAnalysis) -> str:
    return _section(
        "method",
        "How this was measured",
        "",
        "<ul><li>Every token of the texts but BOS counts once; texts longer than a window are cut, each window is read after "
        "BOS, and no pair of consecutive tokens spans two windows.</li>"
        f"<li>± is one standard error, over blocks of {BLOCK_TOKENS} consecutive tokens, because neighbours are routed "
        "alike.</li><li>Chance pairs are those of quasi-independence: each expert is used as often as it is, and never with "
        "itself.</li><li>Effective experts are two to the entropy of the shares.</li>"
        f"<li>Figures of {PUBLISHED_MODEL} are those of the paper's table 5 on The Pile, for text of the same kind by its "
        "name; other texts give other figures.</li></ul>",
    )


def _section(name: str, title: str, words: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{f"<p>{words}</p>" if words else ""}{body}</section>'


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, theirs: int | None = None) -> str:
    """Cells are HTML; from column ``theirs`` on they are the paper's."""

    def kind(index: int) -> str:
        return ' class="theirs"' if theirs is not None and index >= theirs else ""

    head = "".join(f'<th scope="col"{kind(at)}>{name}</th>' for at, name in enumerate(columns))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind(at)}>{cell}</td>" for at, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _show(value: float) -> str:
    return f"{value:.1%}" if value and value < 0.9995 else f"{value:.0%}"


def _tick(value: float) -> str:
    return f"{value:.0%}"


def _percent(estimate: Estimate, place: tuple[int, ...]) -> str:
    value, error = estimate.value[place], estimate.stderr[place]
    if not np.isfinite(value):
        return "–"
    return f"{value:.1%}" + (f" <small>± {100 * error:.1f}</small>" if np.isfinite(error) else "")
