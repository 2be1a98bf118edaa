"""The page in a headless Chromium: what people do with it, and what the server is asked then."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.server.browser import CHROMIUM, SHIFT, Browser, Page, chromium
from tests.server.conftest import Running, Serve, wait_until
from tests.server.test_page import LEAST_CONTRAST, contrast

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

IDLE = "running.size === 0"
READY = 'byId("model").options.length > 0'
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
    "**a**b a**b**c *a*b* (**a**) **\"q\"** x",
    "1. a\n   - b\n     - c\n2. d",
    "a | b\n--|--\nc | d\nnot | in\n\nx",
    "- a\n\n      code\n\n* * a",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Opened:
    def open_page(server: Running, beside: Page | None = None, ready: str = READY, **screen: Any) -> Page:
        page = Page(browser, beside)
        page.show(**{"width": 1280, "height": 800} | screen)
        page.open(f"{server.url}/")
        page.wait(ready)
        return page

    return open_page


def ask(page: Page, text: str, **settings: Any) -> str:
    """Send a message as one does at the keyboard; the answer, once it is whole."""
    page.run(f"current.settings = {json.dumps({'temperature': 0, 'max_tokens': 8} | settings)}")
    page.run('byId("draft").focus()')
    page.write(text)
    page.press("Enter")
    page.wait(f"{IDLE} && branch(current).at(-1)?.role === 'assistant'")
    return str(page.run("branch(current).at(-1).text"))


def click(page: Page, label: str, place: str = "document") -> None:
    """The last button that is called so."""
    found = f"[...{place}.querySelectorAll('button')].findLast((each) => (each.ariaLabel ?? each.textContent) === {label!r})"
    page.run(f"{found}.click()")


def test_an_answer_is_streamed_and_stands_there_as_the_server_gives_it(server: Running, opened: Opened) -> None:
    page = opened(server)
    page.run('current.settings = { temperature: 0, max_tokens: 24, system: "Be brief.", stop: ["\\u0000never"], seed: 3 }')
    assert page.run("document.activeElement.id") == "draft"
    page.write("In the beginning")
    page.press("Enter", SHIFT)
    page.write("there was 🙂")
    assert page.run('byId("draft").value') == "In the beginning\nthere was 🙂"
    page.press("Enter")
    page.wait(f"{IDLE} && current.nodes.length === 2")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "In the beginning\nthere was 🙂"},
    ]
    expected = server.chat(messages, max_tokens=24)
    assert page.run("current.nodes[1].text") == expected["choices"][0]["message"]["content"]
    (body,) = page.bodies
    assert body["messages"] == messages
    assert (body["stream"], body["seed"], body["stop"], body["model"]) == (True, 3, ["\0never"], "tiny")
    facts = page.run("document.querySelector('.assistant .facts').textContent")
    assert re.search(r"^24 tokens · [\d.,]+ tokens/s · first after [\d.]+ s · prompt of \d+", facts)
    assert "limit of tokens" in facts
    assert page.run("document.activeElement.id") == "draft"
    assert page.run('byId("draft").value') == ""
    assert all(each.startswith(f"{server.url}/") for each in page.requests if not each.startswith("data:"))
    assert page.complaints == []


def test_escape_stops_the_answer_and_the_server(server: Running, opened: Opened) -> None:
    page = opened(server)
    page.run("current.settings = { temperature: 0, max_tokens: 900 }")
    page.write("Tell me everything")
    page.press("Enter")
    page.wait("current.nodes[1]?.text.length > 5")
    assert page.run('byId("stop").hidden') is False
    page.press("Escape")
    page.wait(IDLE)
    node = page.run("current.nodes[1]")
    assert node["reason"] == "stopped"
    assert "error" not in node
    assert "about" in page.run("document.querySelector('.assistant .facts').textContent")
    wait_until(server.is_idle, "the server is idle")
    wait_until(lambda: "disconnected" in server.log.getvalue(), "the log says so")
    click(page, "Continue this answer")
    page.wait("running.size === 1")
    click(page, "Stop")
    page.wait(IDLE)
    assert page.bodies[-1]["messages"][-1] == {"role": "assistant", "content": node["text"]}
    assert page.run("current.nodes[1].text").startswith(node["text"])
    wait_until(server.is_idle, "the server is idle")


def test_an_edit_or_a_further_answer_loses_nothing(server: Running, opened: Opened) -> None:
    page = opened(server)
    first = ask(page, "One")
    second = ask(page, "Two")
    assert [message["content"] for message in page.bodies[-1]["messages"]] == ["One", first, "Two"]
    click(page, "Regenerate")
    page.wait(f"{IDLE} && current.nodes.length === 5")
    assert page.run("document.querySelectorAll('.count').length") == 1
    assert page.run("document.querySelector('.count').textContent").startswith("2/2")
    click(page, "Previous answer")
    assert page.run("branch(current).at(-1).text") == second
    assert page.run("document.activeElement.ariaLabel") == "Next answer"
    page.run("document.querySelector('.user [data-edit]').click()")
    page.run("document.activeElement.select()")
    page.write("Another one")
    page.press("Enter")
    page.wait(f"{IDLE} && branch(current).length === 2")
    assert page.bodies[-1]["messages"] == [{"role": "user", "content": "Another one"}]
    click(page, "Previous version")
    assert page.run("branch(current).map((node) => node.text)") [:3] == ["One", first, "Two"]
    page.run("document.querySelector('.user [data-edit]').click()")
    page.press("Escape")
    assert page.run("document.querySelector('.user .body').textContent") == "One"
    assert page.run("current.nodes.length") == 7


def test_conversations_are_kept_and_can_be_deleted(server: Running, opened: Opened) -> None:
    page = opened(server)
    ask(page, "The first one")
    click(page, "New conversation")
    ask(page, "The second one")
    titles = "[...document.querySelectorAll('.entry')].map((each) => each.textContent)"
    page.open(f"{server.url}/?again")
    page.wait(READY)
    assert page.run(titles) == ["The second one", "The first one"]
    assert page.run("document.querySelectorAll('.message').length") == 2  # the one that was open
    click(page, "The first one")
    assert page.run("document.querySelector('.user .body').textContent") == "The first one"
    click(page, "Delete The first one")
    assert page.run('byId("confirm").open') is True
    page.press("Escape")
    assert len(page.run(titles)) == 2
    click(page, "Delete The first one")
    click(page, "Delete", 'byId("confirm")')
    page.wait(f"{titles}.length === 1")
    assert page.run("Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).length") == 1
    assert page.run("current.nodes.length") == 0
    click(page, "Delete all conversations")
    click(page, "Delete", 'byId("confirm")')
    page.wait(f"{titles}.length === 0")
    assert page.run("Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).length") == 0


def test_a_conversation_that_is_deleted_is_not_written_further(server: Running, opened: Opened) -> None:
    page = opened(server)
    page.run("current.settings = { temperature: 0, max_tokens: 900 }")
    page.write("Tell me everything")
    page.press("Enter")
    page.wait("current.nodes[1]?.text.length > 5")
    click(page, "Delete Tell me everything")
    click(page, "Delete", 'byId("confirm")')
    page.wait("conversations.size === 0 && current.nodes.length === 0")
    wait_until(server.is_idle, "the server is idle")
    assert ask(page, "Next")
    assert page.run("Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).length") == 1


def test_a_full_or_broken_storage_is_said_and_stops_nothing(server: Running, opened: Opened) -> None:
    page = opened(server)
    page.run("localStorage.setItem(PREFIX + 'broken', '{')")
    page.run("localStorage.setItem(PREFIX + 'foreign', '[1, 2]')")
    page.run("""(() => { for (let size = 1 << 22; size >= 1; size >>= 1) try { for (let i = 0; ; i++)
        localStorage.setItem(`fill-${size}-${i}`, "x".repeat(size)); } catch {} })()""")
    assert ask(page, "Is there room?") == page.run("current.nodes[1].text")
    assert "storage for this page is full" in page.run('byId("notice").textContent')
    page.run("Object.keys(localStorage).filter((key) => key.startsWith('fill-')).forEach((key) => localStorage.removeItem(key))")
    ask(page, "And now?")
    page.open(f"{server.url}/?again")
    page.wait(READY)
    assert page.run("conversations.size") == 1
    assert page.run("[...conversations.values()][0].nodes.length") == 4
    assert page.run("localStorage.getItem(PREFIX + 'broken')") == "{"
    assert page.complaints == []


def test_two_tabs_share_a_conversation(server: Running, opened: Opened) -> None:
    one = opened(server)
    ask(one, "From the first tab")
    other = opened(server, one)
    other.wait("conversations.size === 1")
    click(other, "From the first tab")
    ask(other, "From the second tab")
    one.wait("branch(current).length === 2 && current.nodes.length === 4")
    ask(one, "From the first again")
    other.wait("current.nodes.length === 6")
    one.call("Page.bringToFront")
    # Written by a tab that this one has not heard of yet: a page hears nothing of what it stores itself.
    one.run("""(() => { const kept = parseConversation(localStorage.getItem(PREFIX + current.id));
        addNode(kept, kept.leaf, "user", "unheard"); localStorage.setItem(PREFIX + kept.id, JSON.stringify(kept)); })()""")
    ask(one, "And again")
    assert one.run("current.nodes.filter((node) => node.text === 'unheard').length") == 1
    assert one.run("parseConversation(localStorage.getItem(PREFIX + current.id)).nodes.length") == 9
    click(one, "Delete From the first tab")
    click(one, "Delete", 'byId("confirm")')
    other.wait("conversations.size === 0 && current.nodes.length === 0")


def test_the_key_is_asked_for_and_forgotten_with_the_tab(serve: Serve, opened: Opened) -> None:
    key = "the-key-of-this-server"
    with serve(api_keys=(key,)) as server:
        page = opened(server, ready='byId("ask-key").open')
        assert page.run("document.activeElement.id") == "key"
        page.write("clé fausse")
        page.press("Enter")
        assert "ASCII" in page.run('byId("key-wrong").textContent')
        page.run('byId("key").value = ""')
        page.write("wrong")
        page.press("Enter")
        page.wait('byId("ask-key").open && byId("ask-key-text").textContent.includes("not valid")')
        page.write(key)
        page.press("Enter")
        page.wait(READY)
        assert ask(page, "Hello")
        assert page.run("Object.values(sessionStorage)").count(key) == 1
        assert key not in page.run("JSON.stringify(localStorage)")
        page.run("useApiKey('')")
        page.write("Again")
        page.press("Enter")
        page.wait('byId("ask-key").open')
        page.write(key)
        page.press("Enter")
        page.wait(f"{IDLE} && current.nodes.length === 4")
        assert page.run("current.nodes[3].error") is None
        assert page.run("current.nodes[3].text")


def test_errors_are_told_in_words(serve: Serve, opened: Opened) -> None:
    with serve(max_body_bytes=3000) as server:
        page = opened(server)
        assert ask(page, "0123456789" * 130) == ""
        wrong = "document.querySelector('.assistant:last-child .wrong').textContent"
        assert "context" in page.run(wrong)
        click(page, "New conversation")
        ask(page, "x" * 3000)
        assert page.run(wrong).startswith("The conversation is too long for one request: ")
        click(page, "New conversation")
        ask(page, "fine", max_tokens=0)
        assert page.run(wrong).startswith("The server refused the request: Max_tokens")
        assert page.run("document.querySelector('.assistant:last-child [role=alert]') !== null")
    ask(page, "Anybody?")
    assert page.run(wrong) == f"The server at {page.run('location.host')} cannot be reached. Is it still running?"
    click(page, "Try again")
    page.wait(f"{IDLE} && branch(current).at(-1).error !== undefined")


PARTS = 'data: {"text": "h\u00e9 🙂 \u65e5"}\r\n\r\n: waiting\n\nevent: x\ndata: one\ndata:two\n\rid: 3\rdata\r\rdata: [DONE]\n\n'


def test_events_are_the_same_however_the_bytes_are_cut(server: Running, opened: Opened) -> None:
    page = opened(server)
    cut = """(async () => {
        const bytes = new TextEncoder().encode(%s);
        const results = new Set();
        for (let size = 1; size <= bytes.length; size++) for (let first = 0; first < size; first++) {
            const reader = new EventReader(), found = [];
            for (let at = 0, end = first || size; at < bytes.length; at = end, end += size) found.push(...reader.read(bytes.slice(at, end)));
            results.add(JSON.stringify(found));
        }
        return [...results];
    })()"""
    (found,) = page.run(cut % json.dumps(PARTS))
    assert json.loads(found) == ['{"text": "hé 🙂 日"}', "one\ntwo", "", "[DONE]"]


def test_an_answer_is_drawn_and_spoken_block_by_block(server: Running, opened: Opened) -> None:
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
    page.run(
        """window.fetch = async () => new Response('data: {"choices": [{"delta": {"content": "Half"}}]}\\n\\n')"""
    )
    assert ask(page, "Again") == "Half"
    assert page.run("branch(current).at(-1).error") == "The connection ended before the answer was whole."
    page.run("window.fetch = async () => new Response('data: {\"error\": {\"message\": \"the engine failed\"}}\\n\\n')")
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


def test_markdown_is_read_as_another_reader_reads_it(server: Running, opened: Opened) -> None:
    page = opened(server)
    reader = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    differ = []
    for text in MARKDOWN:
        expected = re.sub(r"(?<![\">])(https://example\.(?:net|com)/(?:y_z_w|a|b))(?=[.),])", r'<a href="\1">\1</a>', reader.render(text))
        pair = (_tree(page.run(f"({OWN_PARTS})({json.dumps(text)})")), _tree(expected))
        differ += [pair] * (pair[0] != pair[1])
    assert differ == []


def test_no_answer_gets_a_script_an_image_or_another_scheme(server: Running, opened: Opened) -> None:
    page = opened(server)
    texts = [
        "<img src=https://example.com/x onerror=alert(1)>", "![x](https://example.com/x.png)", "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,<script>alert(1)</script>)", "[x](//example.com/x)", "[x](/v1/models)",
        "<javascript:alert(1)>", "[x](https://example.com/\"onclick=alert(1))", "[x](file:///etc/passwd)", "javascript:alert(1)",
        "[ja\tva](java\tscript:alert(1))", "[x](vbscript:x)", "```<script>\nalert(1)\n```", "[x](mailto:a@example.com)",
    ]  # fmt: skip
    found = page.run(
        f"""{json.dumps(texts)}.map((text) => {{ const place = document.createElement("div"); place.append(...markdownElements(text));
        return [...place.querySelectorAll("*")].map((each) => [each.localName, each.getAttribute("href"), each.rel ?? "",
            each.getAttributeNames().filter((name) => name.startsWith("on")).length]); }}).flat()"""
    )
    assert {tag for tag, *_ in found} <= {"p", "a", "span", "div", "button", "pre", "code", "strong", "em"}
    links = [(href, rel) for tag, href, rel, _ in found if tag == "a"]
    assert len(links) == 2 + 1  # the picture's own address, that in the attribute, and the one with a quote in it
    assert all(href.startswith("https://example.com/") and rel == "noopener noreferrer nofollow" for href, rel in links)
    assert not any(handlers for *_, handlers in found)


def test_long_and_deep_texts_are_drawn(server: Running, opened: Opened) -> None:
    """Nothing overflows the stack, and no text of this size keeps the page from being used."""
    page = opened(server)
    texts = [
        ">" * 5000 + "x", "- " * 3000 + "x", "*a " * 20000, "**a" * 20000, "[" * 20000, "[a](" * 10000, "`" * 9000 + "a",
        "`a``b" * 8000, "_a_b" * 20000, "~~a" * 20000, "|a" * 5000 + "\n" + "|-" * 5000, "(" * 20000, "![" * 10000, "<" * 20000,
        "https://" * 5000, "[x](https://a.example/" + "(" * 5000, "a\\" * 20000, "- a\n" * 5000, "1. a\n\n" * 3000, "``` \n" * 3000,
    ]  # fmt: skip
    for text in texts:
        page.run(f"markdownElements({json.dumps(text)}).length")


AUDIT = """[...document.querySelectorAll("body *")].flatMap((each) => {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(each);
    if (!own || each.closest(".unseen, .skip, option, noscript") || !each.checkVisibility({visibilityProperty: true}) || each.disabled) return [];
    let behind = each;
    while (behind && /, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    return [[each.textContent.slice(0, 30), style.color, getComputedStyle(behind ?? document.body).backgroundColor]];
})"""
SAMPLE = (
    "# Head\n\nText with `code`, a [link](https://example.com/).\n\n> quote\n\n```python\nx = 1\n```\n\n"
    f"| a | b |\n|---|---|\n| 1 | {'wide ' * 40}|\n\n- item\n\n{'long' * 60}\n\n```\n{'y' * 300}\n```"
)


def _hex(colour: str) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_in_both_themes_and_on_a_phone(server: Running, opened: Opened, width: int) -> None:
    page = opened(server, width=width, height=844, is_phone=width == 390)
    page.run(f"current.nodes = []; addNode(current, null, 'user', {'wide' * 80!r})")
    page.run(f"addNode(current, current.leaf, 'assistant', {json.dumps(SAMPLE)}).error = 'Wrong.'; keep(current); draw()")
    page.run("notice('Something to know', loadModels)")
    for state in ("", "openSidebar()", "closeSidebar(); byId('open-settings').click()"):
        page.run(f"{state}; new Promise((done) => setTimeout(done, 300))")
        for scheme in ("light", "dark"):
            page.show(width, 844, is_phone=width == 390, scheme=scheme)
            page.wait(f"document.documentElement.dataset.theme === '{scheme}'")
            drawn = page.run(AUDIT)
            assert len(drawn) > 12
            low = [(text, fore, back) for text, fore, back in drawn if contrast(_hex(fore), _hex(back)) < LEAST_CONTRAST]
            assert low == []
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("byId('scroll').scrollWidth <= byId('scroll').clientWidth")
        places = "[...document.querySelectorAll('main button, main select, main textarea, .body > *')]"
        assert page.run(f"{places}.every((each) => each.getBoundingClientRect().right <= {width})")
    behind = _hex(page.run("getComputedStyle(document.body).backgroundColor"))
    page.run("byId('settings').close(); byId('theme').value = 'light'; byId('theme').dispatchEvent(new Event('change'))")
    assert _hex(page.run("getComputedStyle(document.body).backgroundColor")) != behind
    page.open(f"{server.url}/?again")
    assert page.run("[document.documentElement.dataset.theme, byId('theme').value]") == ["light", "light"]


def test_everything_is_reached_with_the_tab_key_and_has_a_name(server: Running, opened: Opened) -> None:
    page = opened(server)
    ask(page, "Hello")
    page.run("document.querySelector('.skip').focus()")
    reached = []
    while len(reached) < 40:
        page.press("Tab")
        name = page.run("document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent")
        if name in reached:
            break
        reached.append(name)
    order = ["new", "Hello", "Delete Hello", "theme", "delete-all", "model", "open-settings", "scroll", "Copy this message", "Edit"]
    order += ["Copy this answer", "Regenerate", "Continue this answer", "draft", "send"]
    assert [name for name in reached if name in order] == order
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "spinbutton", "dialog", "navigation", "log", "region", "link", "list"}
    nameless = [
        node for node in tree
        if not node.get("ignored") and node["role"]["value"] in roles - {"list"} and not node.get("name", {}).get("value")
    ]  # fmt: skip
    assert nameless == []


def test_a_phone_has_the_list_in_a_drawer(server: Running, opened: Opened) -> None:
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


def test_settings_are_asked_of_the_server(server: Running, opened: Opened, tmp_path: Path) -> None:
    page = opened(server)
    click(page, "Settings")
    values = {"temperature": "0", "top_k": "5", "max_tokens": "3", "seed": "-7"}
    for name, value in values.items():
        page.run(f"byId('number-{name}').value = {value!r}")
    page.run("byId('system').value = 'Be kind.'; byId('stops').value = 'END\\n##'; byId('name').value = 'Mine'")
    click(page, "Save")
    page.run("byId('draft').focus()")
    page.write("Hello")
    page.press("Enter")
    page.wait(f"{IDLE} && current.nodes.length === 2")
    body = page.bodies[-1]
    assert {name: body[name] for name in values} == {name: int(value) for name, value in values.items()}
    assert body["stop"] == ["END", "##"]
    assert body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert not {"top_p", "min_p", "repetition_penalty"} & set(body)
    assert page.run("document.querySelector('.entry').textContent") == "Mine"
    click(page, "New conversation")
    assert page.run("current.settings.seed") == -7
    click(page, "Settings")
    page.run("byId('number-temperature').value = '9'")
    click(page, "Save")
    assert page.run("byId('settings').open") is True  # out of its range
