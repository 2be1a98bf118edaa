"""The page at / as it is sent: its policy, what it holds, what its controls are called, and its colours."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from mlx_mixtral.server.endpoints.page import PAGE_FOLDER, page_document
from tests.server.conftest import Running, Serve

MAX_PAGE_BYTES = 120_000
HTML = page_document().body.decode()
VOID = {"meta", "link", "input", "br", "hr", "img"}
# What comments link to, and the name of a format: nothing is fetched from there.
NAMED = {
    "https://spec.commonmark.org/0.31.2/",
    "https://html.spec.whatwg.org/multipage/server-sent-events.html",
    "http://www.w3.org/2000/svg",
}
LEAST_CONTRAST = 4.5  # https://www.w3.org/TR/WCAG22/#contrast-minimum
LEAST_EDGE = 3.0  # https://www.w3.org/TR/WCAG22/#non-text-contrast


class Elements(HTMLParser):
    """Every element with its attributes and its text, that of its children too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.found.append((tag, {name: value or "" for name, value in attrs}, text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, tag

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str], str]]:
    parser = Elements()
    parser.feed(HTML)
    parser.close()
    return [(tag, attributes, "".join(text)) for tag, attributes, text in parser.found]


def _policy(text: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in text.split(";"))}


def test_it_is_served_with_a_policy_that_lets_only_itself_run(
    server: Running, elements: list[tuple[str, dict[str, str], str]]
) -> None:
    reply = server.client.get("/")
    assert reply.status_code == 200
    assert reply.text == HTML
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    expected = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }
    assert expected.items() <= dict(reply.headers).items()
    policy = _policy(reply.headers["content-security-policy"])
    for tag in ("style", "script"):
        hashes = [hashlib.sha256(text.encode()).digest() for name, _, text in elements if name == tag]
        assert hashes
        assert policy[f"{tag}-src"] == [f"'sha256-{base64.b64encode(each).decode()}'" for each in hashes]
    assert policy["connect-src"] == ["'self'"]
    assert policy["img-src"] == ["data:"]
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert "unsafe" not in reply.headers["content-security-policy"]


def test_it_can_be_left_out(serve: Serve) -> None:
    with serve(has_page=False) as server:
        assert server.client.get("/").status_code == 404


def test_it_needs_no_key_and_gives_none_away(serve: Serve) -> None:
    with serve(api_keys=("the-key-of-this-server",)) as server:
        reply = server.client.get("/", headers={"authorization": ""})
        assert reply.text == HTML
        assert server.client.get("/v1/models", headers={"authorization": ""}).status_code == 401


def test_it_is_read_and_not_written(server: Running) -> None:
    assert server.post("/", {}).status_code == 405
    head = server.client.head("/")
    assert head.content == b""
    assert int(head.headers["content-length"]) == len(HTML.encode())


def test_it_holds_all_that_it_needs_and_is_small(elements: list[tuple[str, dict[str, str], str]]) -> None:
    assert len(HTML.encode()) < MAX_PAGE_BYTES
    assert set(re.findall(r"""https?://[^\s"'<>)`]+[\w/]""", HTML)) == NAMED
    for tag, attributes, _ in elements:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml,")), (tag, attributes)
    styles = "".join(text for tag, _, text in elements if tag == "style")
    assert "url(" not in styles
    assert "@import" not in styles
    index = (PAGE_FOLDER / "index.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in PAGE_FOLDER.iterdir() if path.suffix in (".js", ".css")) == sorted(
        re.findall(r'"([\w-]+\.(?:css|js))"', index)
    )


def test_nothing_that_is_said_becomes_markup(elements: list[tuple[str, dict[str, str], str]]) -> None:
    """Text goes into nodes as text: whatever parses it as HTML or runs it is not used at all."""
    scripts = "".join(text for tag, _, text in elements if tag == "script")
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(|srcdoc|DOMParser"
        r"|createContextualFragment"
    )
    assert re.search(sinks, scripts) is None
    for tag, attributes, _ in elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)


def test_every_control_has_a_name(elements: list[tuple[str, dict[str, str], str]]) -> None:
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes["for"]: text.strip() for tag, attributes, text in elements if tag == "label"}
    assert set(labels) <= set(ids)
    controls = 0
    for tag, attributes, text in elements:
        if tag in ("input", "select", "textarea"):
            controls += 1
            assert labels.get(attributes["id"]), attributes
        elif tag == "button":
            controls += 1
            assert attributes.get("aria-label") or re.search(r"\w", text), attributes
            assert attributes["type"] in ("button", "submit")
        elif tag in ("dialog", "nav", "section"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby"), attributes
        assert int(attributes.get("tabindex", 0)) <= 0, "the order of the page is the order of its focus"
        for name in ("aria-labelledby", "aria-describedby", "aria-controls"):
            assert set(attributes.get(name, "").split()) <= set(ids)
    assert controls > 15
    assert elements[0][:2] == ("html", {"lang": "en"})
    assert [text for tag, _, text in elements if tag == "title"] == ["mlx-mixtral"]
    viewport = next(attributes["content"] for _, attributes, _ in elements if attributes.get("name") == "viewport")
    assert "width=device-width" in viewport
    assert "user-scalable" not in viewport


def test_scripts_look_for_elements_that_are_there(elements: list[tuple[str, dict[str, str], str]]) -> None:
    ids = {attributes["id"] for _, attributes, _ in elements if "id" in attributes}
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', HTML))
    assert len(wanted) > 15
    assert wanted <= ids


def _luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _colours(selector: str) -> dict[str, str]:
    block = re.search(rf"(?:^|>){re.escape(selector)} \{{(.*?)^\}}", HTML, re.MULTILINE | re.DOTALL)
    assert block is not None
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block[1]))


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(selector: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    colours = _colours(selector)
    assert set(colours) == set(_colours(":root"))
    pairs = [
        *((text, back) for text in ("text", "muted") for back in ("back", "surface", "side", "code", "user", "hover")),
        *(("link", back) for back in ("back", "user", "surface")),
        *(("danger", back) for back in ("back", "side", "hover")),
        ("text", "notice"), ("on-accent", "accent"), ("on-danger", "danger"), ("back", "text"),
    ]  # fmt: skip
    low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert {pair: round(found, 2) for pair, found in low.items() if found < LEAST_CONTRAST} == {}
    for back in ("back", "surface"):
        assert contrast(colours["edge"], colours[back]) >= LEAST_EDGE
        assert contrast(colours["accent"], colours[back]) >= LEAST_EDGE
