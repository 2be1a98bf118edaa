"""The page: whole, self-contained, with every foreign text escaped; the picture."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mlx_mixtral.evaluation.routing import RoutingRecord, analyse
from mlx_mixtral.evaluation.routing.excerpt import excerpts, expert_colour
from mlx_mixtral.evaluation.routing.page import routing_page
from mlx_mixtral.evaluation.routing.plots import draw_routing
from mlx_mixtral.experts.trace import RoutingTrace

pytest.importorskip("matplotlib")

VOID = {"meta", "input", "br"}
EVIL = "</b><script>alert(1)</script>&\"'\u202e"


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what a browser would show and fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: dict[str, str] = {}
        self.shapes: dict[str, dict[str, str | None]] = {}
        """By its title, each shape of a figure."""
        self._shape: dict[str, str | None] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [found[name] or "" for name in ("href", "src", "xlink:href", "action") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        assert not any(name.startswith("on") for name in found)
        self._shape = found if tag in ("use", "path") else self._shape
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        at = "s" if "s" in self.open else self.open[-1] if self.open else ""
        if at == "title" and "svg" in self.open:
            self.shapes[data] = self._shape
        self.text[at] = self.text.get(at, "") + data


def record(
    num_experts: int = 8, per_token: int = 2, layers: int = 4, domains: tuple[str, ...] = ("code", EVIL)
) -> RoutingRecord:
    tokens = 200
    experts = np.random.default_rng(0).random((tokens, layers, num_experts)).argsort(axis=2)[..., :per_token]
    pieces = tuple("\x1b[31m\n" if at == 3 else f"<{at}\t&" for at in range(tokens))
    starts = tuple(range(0, tokens, tokens // len(domains)))[: len(domains)]
    return RoutingRecord(
        RoutingTrace(experts.astype(np.uint16), num_experts, starts),
        domains,
        np.arange(len(domains)),
        np.random.default_rng(1).random((tokens, layers)).astype(np.float16),
        pieces,
        EVIL,
    )


def page(made: RoutingRecord, tokens: int = 20, layers: tuple[int, ...] | None = None) -> str:
    return routing_page(analyse(made), excerpts(made, tokens), layers)


@pytest.fixture(scope="module")
def usual() -> str:
    """The page of ``record()``."""
    return page(record())


def test_it_is_one_whole_file_that_fetches_and_runs_nothing(usual: str) -> None:
    found = Page(usual)
    own = [link for link in found.links if link.startswith("#")]
    assert [link for link in found.links if link not in own] == ["https://arxiv.org/abs/2401.04088"]
    assert {link[1:] for link in own} <= set(found.ids)
    assert not {"script", "link", "img", "iframe", "object", "form", "image"} & set(found.tags)
    assert len(set(found.ids)) == len(found.ids)
    assert "url(" not in found.text["style"]
    assert "@import" not in found.text["style"]
    assert EVIL in found.text["h1"]
    assert EVIL in found.text["h3"]


def test_text_is_there_once_in_the_colours_of_each_layer() -> None:
    made = record(domains=("code",))
    html = page(made, layers=(1, 3))
    found = Page(html)
    assert made.pieces is not None
    assert found.text["b"].endswith("".join(made.pieces[:20]).replace("\x1b", "␛"))
    classes = re.findall(r'<b class="a(\d) b(\d)">', html)
    assert [[int(number) for number in pair] for pair in classes] == made.trace.experts[:20, [1, 3], 0].tolist()
    for expert in set(made.trace.experts[:20, 3, 0].tolist()):
        assert f"#layer-b:checked~.text .b{expert}{{background:{expert_colour(expert, 8)}}}" in html


def test_figures_stand_in_the_tables() -> None:
    made = record(layers=1, domains=("code", "fr"))
    found = analyse(made)
    html = page(made)
    for name, domain in found.rows.items():
        for estimate in (domain.repeats_first, domain.repeats_either):
            value, error = estimate.value[0], estimate.stderr[0]
            assert f"{value:.1%} <small>± {100 * error:.1f}</small>" in html, name
    assert ">14.9%<" in html  # GitHub's, beside "code"
    assert ">46.4%<" in html


def test_every_figure_says_and_shows_what_was_found(usual: str) -> None:
    found = analyse(record())
    shapes = Page(usual).shapes
    shown: dict[str, float] = {}
    for name, domain in found.domains.items():
        for layer in range(4):
            assert domain.entropy is not None
            bits = domain.entropy.value[layer]
            assert f"{name}, layer {layer}: {bits:.2f}" in shapes
            shown[f"{name}, layer {layer}: {domain.repeats_either.value[layer]:.1%}"] = domain.repeats_either.value[
                layer
            ]
        for expert, share in enumerate(domain.shares.value[3]):
            assert f"{name}, expert {expert}: {share:.1%}" in shapes
            assert f"layer 3, expert {expert}: {share:.1%}" in shapes
    # Heights are those values on one scale.
    heights = [float(shapes[title]["y"] or "") for title in shown]
    assert np.corrcoef(heights, list(shown.values()))[0, 1] == pytest.approx(-1, abs=1e-6)
    bars = {
        f"{name}, expert {e}: {share:.1%}": share
        for name, d in found.domains.items()
        for e, share in enumerate(d.shares.value[3])
    }
    heights = [min(map(float, re.findall(r"[ML] \S+ (\S+)", shapes[title]["d"] or ""))) for title in bars]
    assert np.corrcoef(heights, list(bars.values()))[0, 1] == pytest.approx(-1, abs=1e-6)
    lift, pairs = found.overall.clear_lift[3], found.overall.pairs.value[3]
    for a, b in np.argwhere(np.isfinite(lift)):
        cell = shapes[f"{a} and {b}: {pairs[a, b]:.2%} of tokens, {lift[a, b]:.2f} of chance"]
        assert f"fill: var(--{'hi' if lift[a, b] >= 1 else 'lo'})" in (cell["style"] or "")


def test_the_same_record_gives_the_same_bytes(usual: str) -> None:
    assert page(record()) == usual


def test_figures_follow_light_and_dark_and_the_width(usual: str) -> None:
    figures = re.findall("<svg.*?</svg>", usual)
    assert len(figures) == len(re.findall("<svg", usual)) > 10
    for figure in figures:
        assert re.match(r'<svg class="chart" viewBox="0 0 \d+ \d+" role="img" aria-label="[^"]+">', figure)
        assert "var(--soft)" in figure
        assert "<style" not in figure  # it would hold for the whole page
        assert not {"#000000", "#ffffff", "data:"} & set(re.findall(r"#\w{6}|data:", figure))


@pytest.mark.parametrize(
    ("num_experts", "per_token", "layers", "domains"),
    [
        (1, 1, 1, ("one",)),
        (8, 1, 2, ("a", "b")),
        (4, 3, 1, ("a", "b")),
        (18, 4, 2, tuple(f"domain {number}" for number in range(9))),
    ],
)
def test_any_shape_gives_a_page_and_a_picture(
    num_experts: int, per_token: int, layers: int, domains: tuple[str, ...]
) -> None:
    made = record(num_experts, per_token, layers, domains)
    html = page(made)
    Page(html)
    assert "nan" not in html.lower()
    assert draw_routing(analyse(made)).startswith(b"\x89PNG")


def test_without_text_there_is_no_coloured_text() -> None:
    made = record(layers=1, domains=("code",))
    assert 'id="text"' not in page(made, tokens=0)
    bare = RoutingRecord.of_trace(made.trace)
    html = page(bare)
    Page(html)
    assert 'id="text"' not in html
    assert 'id="entropy"' not in html


def test_colours_are_distinct() -> None:
    for count in (8, 64):
        assert len({expert_colour(expert, count) for expert in range(count)}) == count
