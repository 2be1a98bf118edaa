"""How the page draws streams and markdown, and whether it can be read, heard and used by keys, in themes and on phones."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from tests.server.browser import CHROMIUM, ask, click
from tests.server.conftest import OpenPage, Running
from tests.server.test_page import LEAST_CONTRAST, contrast

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

MARKDOWN = [
    "A paragraph with *one*, **two**, ***three***, ~~four~~ and `five *stays*`.\nSecond line.\n\nAnother.",
    "# One\n\n## Two ##\n\ntext\n### Three\nmore\n\nUnder\n---\n\nOver\n===",
    "- a\n- b\n  - c\n    continued\n  - d\n\n    loose\n- e",
    "3. three\n4. four\n   1. inner\n\nafter",
    "1. one\n\n   ```python\n   x = 1\n\n   y = 2\n   ```\n\n2. two",
    "```python\nprint('<b>&amp;</b>')\n```\n\n~~~\n```\n~~~\n\n````md\n```\ninner\n```\n````",
    "text\n\n    indented\n\n      more\n\nend",
    "> quoted\n> - list\n>\n> > deeper\n\nnot",
    "| a | b |\n|:--|--:|\n| `x` | **y** |\n| 1 \\| 2 |\n\nafter",
    "---\n\n***\n\n* * *",
    "snake_case_name and 2 * 3 * 4, __init__ and \\*escaped\\* \\_too\\_ and a * b",
    "[link](https://example.com/a_(b)?q=1 'title') and <https://example.org/x> and https://example.net/y_z_w.",
    "(see https://example.com/a). Then https://example.com/b, or not.",
    "<script>alert(1)</script> <b>bold</b> &amp; &lt;",
    "**bold with `code` and [link](https://example.com/)**",
    "unclosed **bold and `code and [link](",
    "**a *b* c** and *a **b** c* and **a *b***",
    "* star\n* list\n\n+ plus",
    "Sum: 1. not a list\n2. nor this",
    "&amp;lt; &#128578; &#x41; &nope; & &#0; AT&T &lt;b&gt;",
    "a\n- b\nc\n\nd",
    "> a\n\n> b",
    "```\nopen\n",
    "- a\n\n\n- b",
    "#nohash\n\n#\n\n## ",
    "a  \nb\\\nc",
    "`` a`b `` and ` `` `",
    '**a**b a**b**c *a*b* (**a**) **"q"** x',
    "1. a\n   - b\n     - c\n2. d",
    "a | b\n--|--\nc | d\nnot | in\n\nx",
    "- a\n\n      code\n\n* * a",
]


PARTS = (
    'data: {"text": "h\u00e9 🙂 \u65e5"}\r\n\r\n: waiting\n\nevent: x\ndata: one\ndata:two\n\r'
    "id: 3\rdata\r\rdata: [DONE]\n\n"
)


def test_events_are_the_same_however_the_bytes_are_cut(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    cut = """(async () => {
        const bytes = new TextEncoder().encode(%s);
        const results = new Set();
        for (let size = 1; size <= bytes.length; size++) for (let first = 0; first < size; first++) {
            const reader = new EventReader(), found = [];
            for (let at = 0, end = first || size; at < bytes.length; at = end, end += size) {
                found.push(...reader.read(bytes.slice(at, end)));
            }
            results.add(JSON.stringify(found));
        }
        return [...results];
    })()"""
    (found,) = page.run(cut % json.dumps(PARTS))
    assert json.loads(found) == ['{"text": "hé 🙂 日"}', "one\ntwo", "", "[DONE]"]


def test_an_answer_is_drawn_and_spoken_block_by_block(server: Running, opened: OpenPage) -> None:
    """From bytes that are cut within characters; a screen reader hears each block once, when it is whole."""
    page = opened(server)
    text = "# Title 🙂\n\nOne *two* 日本.\n\n```python\nx = 1\n```\n\n- a\n- b\n"
    deltas = [text[at : at + 3] for at in range(0, len(text), 3)]
    chunks = [{"choices": [{"delta": {"content": delta}, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    sent = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.run(
        f"""{{ const bytes = new TextEncoder().encode({json.dumps(sent)}); window.drawn = []; let at = 0;
        window.fetch = async () => new Response(new ReadableStream({{ async pull(controller) {{
            if (at >= bytes.length) return controller.close();
            controller.enqueue(bytes.slice(at, at += 5));
            if (at % 200 === 0) {{
                await new Promise((done) => setTimeout(done, 60));
                drawn.push([...byId("spoken").children].map((each) => each.textContent));
            }}
        }} }}), {{ headers: {{ "content-type": "text/event-stream" }} }}); undefined }}"""
    )
    assert ask(page, "Go") == text
    spoken = ["Title 🙂", "One two 日本.", "Code in python.", "ab"]
    assert page.run("[...byId('spoken').children].map((each) => each.textContent)") == spoken
    assert all(each == spoken[: len(each)] for each in page.run("drawn"))
    assert len({len(each) for each in page.run("drawn")}) > 2
    assert page.run("byId('status').textContent") == "The answer is complete"
    shown = page.run("[...document.querySelector('.assistant .body').children].map((each) => each.localName)")
    assert shown == ["h3", "p", "div", "ul"]
    assert "about" in page.run("document.querySelector('.assistant .facts').textContent")
    # A stream that ends early is an error, and what there is of it stays.
    page.run("""window.fetch = async () => new Response('data: {"choices": [{"delta": {"content": "Half"}}]}\\n\\n')""")
    assert ask(page, "Again") == "Half"
    assert page.run("branch(current).at(-1).error") == "The connection ended before the answer was whole."
    page.run('window.fetch = async () => new Response(\'data: {"error": {"message": "the engine failed"}}\\n\\n\')')
    assert ask(page, "Again") == ""
    assert page.run("document.querySelector('.assistant:last-child .wrong').textContent") == "The engine failed."


class Tree(HTMLParser):
    """HTML without what tells two renderings of one text apart that mean the same."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kept = {name: value for name, value in attrs if name in ("href", "start") and (name, value) != ("start", "1")}
        self.parts.append(f"<{'del' if tag == 's' else tag}{kept or ''}>")

    def handle_endtag(self, tag: str) -> None:
        self.parts.append(f"</{'del' if tag == 's' else tag}>")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.parts.append(data.strip("\n") if self.parts[-1:] == ["<code>"] else re.sub(r"\s+", " ", data).strip())


def _tree(html: str) -> list[str]:
    tree = Tree()
    tree.feed(html)
    tree.close()
    return [part for part in tree.parts if part not in ("</br>", "</hr>")]


OWN_PARTS = """(text) => {
    const place = document.createElement("div");
    place.append(...markdownElements(text));
    place.querySelectorAll(".code-head").forEach((each) => each.remove());
    place.querySelectorAll(".code, .wide-content").forEach((each) => each.replaceWith(...each.childNodes));
    for (const level of [1, 2, 3, 4]) place.querySelectorAll(`.level-${level}`).forEach((each) => {
        const made = document.createElement(`h${level}`); made.append(...each.childNodes); each.replaceWith(made); });
    return place.innerHTML;
}"""


def test_markdown_is_read_as_another_reader_reads_it(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    reader = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    differ = []
    for text in MARKDOWN:
        expected = re.sub(
            r"(?<![\">])(https://example\.(?:net|com)/(?:y_z_w|a|b))(?=[.),])",
            r'<a href="\1">\1</a>',
            reader.render(text),
        )
        pair = (_tree(page.run(f"({OWN_PARTS})({json.dumps(text)})")), _tree(expected))
        differ += [pair] * (pair[0] != pair[1])
    assert differ == []


def test_no_answer_gets_a_script_an_image_or_another_scheme(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    texts = [
        "<img src=https://example.com/x onerror=alert(1)>", "![x](https://example.com/x.png)", "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,<script>alert(1)</script>)", "[x](//example.com/x)", "[x](/v1/models)",
        "<javascript:alert(1)>", "[x](https://example.com/\"onclick=alert(1))", "[x](file:///etc/passwd)",
        "javascript:alert(1)",
        "[ja\tva](java\tscript:alert(1))", "[x](vbscript:x)", "```<script>\nalert(1)\n```", "[x](mailto:a@example.com)",
    ]  # fmt: skip
    found = page.run(
        f"""{json.dumps(texts)}.map((text) => {{
        const place = document.createElement("div"); place.append(...markdownElements(text));
        return [...place.querySelectorAll("*")].map((each) => [each.localName, each.getAttribute("href"), each.rel ?? "",
            each.getAttributeNames().filter((name) => name.startsWith("on")).length]); }}).flat()"""
    )
    assert {tag for tag, *_ in found} <= {"p", "a", "span", "div", "button", "pre", "code", "strong", "em"}
    links = [(href, rel) for tag, href, rel, _ in found if tag == "a"]
    assert len(links) == 2 + 1  # the picture's own address, that in the attribute, and the one with a quote in it
    assert all(href.startswith("https://example.com/") and rel == "noopener noreferrer nofollow" for href, rel in links)
    assert not any(handlers for *_, handlers in found)


def test_long_and_deep_texts_are_drawn(server: Running, opened: OpenPage) -> None:
    """Nothing overflows the stack, and no text of this size keeps the page from being used."""
    page = opened(server)
    texts = [
        ">" * 5000 + "x", "- " * 3000 + "x", "*a " * 20000, "**a" * 20000, "[" * 20000, "[a](" * 10000, "`" * 9000 + "a",
        "`a``b" * 8000, "_a_b" * 20000, "~~a" * 20000, "|a" * 5000 + "\n" + "|-" * 5000, "(" * 20000, "![" * 10000, "<" * 20000,
        "https://" * 5000, "[x](https://a.example/" + "(" * 5000, "a\\" * 20000, "- a\n" * 5000, "1. a\n\n" * 3000,
        "``` \n" * 3000,
    ]  # fmt: skip
    for text in texts:
        page.run(f"markdownElements({json.dumps(text)}).length")


AUDIT = """[...document.querySelectorAll("body *")].flatMap((each) => {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(each);
    const isSeen = each.checkVisibility({visibilityProperty: true}) && !each.closest(".unseen, .skip, option, noscript");
    if (!own || !isSeen || each.disabled) return [];
    let behind = each;
    const colour = (place) => getComputedStyle(place).backgroundColor;
    while (behind && /, 0\\)$|transparent/.test(colour(behind))) behind = behind.parentElement;
    return [[each.textContent.slice(0, 30), style.color, colour(behind ?? document.body)]];
})"""
SAMPLE = (
    "# Head\n\nText with `code`, a [link](https://example.com/).\n\n> quote\n\n```python\nx = 1\n```\n\n"
    f"| a | b |\n|---|---|\n| 1 | {'wide ' * 40}|\n\n- item\n\n{'long' * 60}\n\n```\n{'y' * 300}\n```"
)


def _hex(colour: str) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_in_both_themes_and_on_a_phone(server: Running, opened: OpenPage, width: int) -> None:
    page = opened(server, width=width, height=844, is_phone=width == 390)
    page.run(f"current.nodes = []; addNode(current, null, 'user', {'wide' * 80!r})")
    page.run(
        f"addNode(current, current.leaf, 'assistant', {json.dumps(SAMPLE)}).error = 'Wrong.'; keep(current); draw()"
    )
    page.run("notice('Something to know', loadModels)")
    for state in ("", "openSidebar()", "closeSidebar(); byId('open-settings').click()"):
        page.run(f"{state}; new Promise((done) => setTimeout(done, 300))")
        for scheme in ("light", "dark"):
            page.show(width, 844, is_phone=width == 390, scheme=scheme)
            page.wait(f"document.documentElement.dataset.theme === '{scheme}'")
            drawn = page.run(AUDIT)
            assert len(drawn) > 12
            low = [
                (text, fore, back) for text, fore, back in drawn if contrast(_hex(fore), _hex(back)) < LEAST_CONTRAST
            ]
            assert low == []
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("byId('scroll').scrollWidth <= byId('scroll').clientWidth")
        places = "[...document.querySelectorAll('main button, main select, main textarea, .body > *')]"
        assert page.run(f"{places}.every((each) => each.getBoundingClientRect().right <= {width})")
    behind = _hex(page.run("getComputedStyle(document.body).backgroundColor"))
    page.run(
        "byId('settings').close(); byId('theme').value = 'light'; byId('theme').dispatchEvent(new Event('change'))"
    )
    assert _hex(page.run("getComputedStyle(document.body).backgroundColor")) != behind
    page.open(f"{server.url}/?again")
    assert page.run("[document.documentElement.dataset.theme, byId('theme').value]") == ["light", "light"]


def test_everything_is_reached_with_the_tab_key_and_has_a_name(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    ask(page, "Hello")
    page.run("document.querySelector('.skip').focus()")
    reached = []
    while len(reached) < 40:
        page.press("Tab")
        name = page.run(
            "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent"
        )
        if name in reached:
            break
        reached.append(name)
    order = [
        "new",
        "Hello",
        "Delete Hello",
        "theme",
        "delete-all",
        "model",
        "open-settings",
        "scroll",
        "Copy this message",
        "Edit",
    ]
    order += ["Copy this answer", "Regenerate", "Continue this answer", "draft", "send"]
    assert [name for name in reached if name in order] == order
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "spinbutton", "dialog", "navigation", "log", "region", "link", "list"}
    nameless = [
        node for node in tree
        if not node.get("ignored") and node["role"]["value"] in roles - {"list"} and not node.get("name", {}).get("value")
    ]  # fmt: skip
    assert nameless == []


def test_a_phone_has_the_list_in_a_drawer(server: Running, opened: OpenPage) -> None:
    page = opened(server, width=390, height=844, is_phone=True)
    assert page.run("byId('sidebar').checkVisibility({ visibilityProperty: true })") is False
    click(page, "Conversations")
    assert page.run("document.activeElement.id") == "close-sidebar"
    assert page.run("document.querySelector('main').inert") is True
    page.press("Escape")
    assert page.run("document.activeElement.id") == "open-sidebar"
    assert page.run("document.querySelector('main').inert") is False
    sizes = page.run(
        "[...document.querySelectorAll('header button, #composer button')].filter((each) => each.checkVisibility())"
        ".map((each) => each.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 40
