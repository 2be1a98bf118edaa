"""The page in a headless Chromium: what people do with it, and what the server is asked then."""

from __future__ import annotations

import re

import pytest

from tests.server.browser import CHROMIUM, IDLE, READY, SHIFT, ask, click
from tests.server.conftest import OpenPage, Running, Serve, wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


def test_an_answer_is_streamed_and_stands_there_as_the_server_gives_it(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    page.run(
        'current.settings = { temperature: 0, max_tokens: 24, system: "Be brief.", stop: ["\\u0000never"], seed: 3 }'
    )
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


def test_escape_stops_the_answer_and_the_server(server: Running, opened: OpenPage) -> None:
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


def test_an_edit_or_a_further_answer_loses_nothing(server: Running, opened: OpenPage) -> None:
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
    assert page.run("branch(current).map((node) => node.text)")[:3] == ["One", first, "Two"]
    page.run("document.querySelector('.user [data-edit]').click()")
    page.press("Escape")
    assert page.run("document.querySelector('.user .body').textContent") == "One"
    assert page.run("current.nodes.length") == 7


def test_conversations_are_kept_and_can_be_deleted(server: Running, opened: OpenPage) -> None:
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


def test_a_conversation_that_is_deleted_is_not_written_further(server: Running, opened: OpenPage) -> None:
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


def test_a_full_or_broken_storage_is_said_and_stops_nothing(server: Running, opened: OpenPage) -> None:
    page = opened(server)
    page.run("localStorage.setItem(PREFIX + 'broken', '{')")
    page.run("localStorage.setItem(PREFIX + 'foreign', '[1, 2]')")
    page.run("""(() => { for (let size = 1 << 22; size >= 1; size >>= 1) try { for (let i = 0; ; i++)
        localStorage.setItem(`fill-${size}-${i}`, "x".repeat(size)); } catch {} })()""")
    assert ask(page, "Is there room?") == page.run("current.nodes[1].text")
    assert "storage for this page is full" in page.run('byId("notice").textContent')
    page.run(
        "Object.keys(localStorage).filter((key) => key.startsWith('fill-')).forEach((key) => localStorage.removeItem(key))"
    )
    ask(page, "And now?")
    page.open(f"{server.url}/?again")
    page.wait(READY)
    assert page.run("conversations.size") == 1
    assert page.run("[...conversations.values()][0].nodes.length") == 4
    assert page.run("localStorage.getItem(PREFIX + 'broken')") == "{"
    assert page.complaints == []


def test_two_tabs_share_a_conversation(server: Running, opened: OpenPage) -> None:
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


def test_the_key_is_asked_for_and_forgotten_with_the_tab(serve: Serve, opened: OpenPage) -> None:
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


def test_errors_are_told_in_words(serve: Serve, opened: OpenPage) -> None:
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


def test_settings_are_asked_of_the_server(server: Running, opened: OpenPage) -> None:
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
