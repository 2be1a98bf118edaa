"""``chat`` as it is typed at a terminal, a pseudo-terminal here: editing, pasting, completing, remembering, leaving."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import SLOW_TOKENS, TOUCHES, Spawn
from .terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, TAB, UP, Terminal

Open = Callable[..., Terminal]


@pytest.fixture
def terminal(spawn: Spawn, short: Path, tmp_path: Path) -> Open:
    """Opens a terminal with ``chat`` of two layers in it."""

    def start(*arguments: object, **options: Any) -> Terminal:
        flags = ("--seed", 1, "-n", 12, "--logit-bias", "2=-100", "--chat-template", "mistral-v1", *arguments)
        return Terminal(spawn, tmp_path / "state", short, *flags, **options)

    return start


def said(file: Path) -> list[str]:
    """What the user said in a saved conversation."""
    return [turn["content"] for turn in json.loads(file.read_text())["messages"] if turn["role"] == "user"]


def wait_for_answer(chat: Terminal) -> None:
    """Until something of the answer to Hello is there."""
    while not chat.text.partition("Hello\r\r\n")[2].strip():
        assert chat.read()


def save_and_leave(chat: Terminal, place: Path, messages: int) -> None:
    """Save the conversation, which has so many messages, and end the chat by Ctrl-D."""
    chat.until()
    chat.type(f"/save {place}", ENTER)
    chat.until(f"(saved {messages} messages")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_ctrl_d_leaves_and_ctrl_c_says_so_however_often(terminal: Open) -> None:
    chat = terminal()
    assert "/help for help, Ctrl-D to leave" in " ".join(chat.until().split())
    chat.type("half a line")
    chat.until("half a line")
    for _ in range(4):
        chat.type(CTRL_C)
        chat.until("(Ctrl-D or /exit to leave)")
        chat.until()
    chat.type("/stats", ENTER)
    chat.until("0 messages")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert "Traceback" not in chat.text
    # A question to the terminal, whose answer could land in a message.
    assert b"\x1b[6n" not in chat.raw


def test_a_pasted_text_is_one_message_as_it_is(terminal: Open, tmp_path: Path) -> None:
    text = '\tif x:\\\n\n    """doc"""\n/reset\n  end, naïve – 東京\n'
    chat = terminal()
    chat.until()
    chat.paste(text)
    chat.type(ENTER)
    chat.until("(cut off")
    chat.until()
    chat.paste('/usr/bin/ld: no\n"""')
    chat.type(ENTER)
    chat.until("(cut off")
    save_and_leave(chat, tmp_path / "talk", 4)
    assert said(tmp_path / "talk") == [text.strip(), '/usr/bin/ld: no\n"""']


def test_several_lines_are_typed_in_three_ways(terminal: Open, tmp_path: Path) -> None:
    chat = terminal()
    for lines in (["one\\", "two"], ['"""', "three", "", '  four"""']):
        chat.until()
        for line in lines:
            chat.type(line, ENTER)
        chat.until("(cut off")
    chat.until()
    chat.type("five", ALT_ENTER, "six", ENTER)
    chat.until("(cut off")
    save_and_leave(chat, tmp_path / "talk", 6)
    assert said(tmp_path / "talk") == ["one\ntwo", "three\n\n  four", "five\nsix"]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_three_ctrl_c_during_an_answer_lose_nothing(terminal: Open, tmp_path: Path, term: str) -> None:
    begun = tmp_path / "begun"
    chat = terminal("-n", 900, before=SLOW_TOKENS + TOUCHES.format(str(begun)), TERM=term)
    chat.until()
    # Nobody reads: more than a terminal takes is on its way when the answer begins.
    for _ in range(6):
        chat.type("/help", ENTER)
    chat.type("Hello", ENTER)
    while not begun.exists():
        assert chat.process.poll() is None
        time.sleep(0.02)
    # What is typed ahead is the next message's.
    chat.type("/set ", CTRL_C, CTRL_C, CTRL_C, "temperature", ENTER)
    chat.until("(stopped; what was said so far is kept)")
    chat.until("temperature  ")
    chat.until()
    chat.type(CTRL_C)
    chat.until("to leave)")
    save_and_leave(chat, tmp_path / "talk", 2)
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"]) < 3000
    # A dumb terminal shows what is typed where it is, in the middle of an answer.
    shown = re.sub(r"/set |\^C|temperature", "", chat.text)
    assert "".join(messages[1]["content"].split()) in "".join(shown.split())


def test_a_text_pasted_while_an_answer_is_written_is_one_message_too(terminal: Open, tmp_path: Path) -> None:
    chat = terminal("-n", 30, before=SLOW_TOKENS)
    chat.until()
    chat.type("Hello", ENTER)
    wait_for_answer(chat)
    lines = "\n".join(f"line {number} of many" for number in range(60))
    chat.paste(lines)
    chat.type(ENTER)
    assert "line" not in chat.until("(cut off")
    chat.until("line 59 of many")
    chat.until("(cut off")
    save_and_leave(chat, tmp_path / "talk", 4)
    assert said(tmp_path / "talk") == ["Hello", lines]


def test_what_was_typed_is_there_in_the_next_chat_and_nobody_else_reads_it(terminal: Open, tmp_path: Path) -> None:
    history = tmp_path / "state" / "mlx-mixtral" / "chat-history"
    first = terminal()
    first.until()
    first.type("/set seed 5", ALT_ENTER, ENTER)
    first.until("seed ")
    first.until()
    first.type(CTRL_D)
    assert first.end() == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    before = history.read_bytes()

    second = terminal("--no-history")
    second.until()
    second.type("/stats", ENTER)
    second.until("0 messages")
    second.type(UP, UP, ENTER)  # its own
    second.until("0 messages")
    second.until()
    second.type(CTRL_D)
    assert second.end() == 0
    assert "seed" not in second.text
    assert history.read_bytes() == before

    third = terminal()
    third.until()
    third.type(UP, ENTER)
    third.until("/set seed 5")
    third.until("seed ")
    third.until()
    third.type(CTRL_D)
    assert third.end() == 0


def test_tab_completes_commands_settings_and_files(terminal: Open, tmp_path: Path) -> None:
    (tmp_path / "some talk.json").write_text('{"messages": []}')
    chat = terminal()
    chat.until()
    chat.type("/lo", TAB, f"{tmp_path}/some", TAB, ENTER)
    chat.until("(loaded 0 messages)")
    chat.until()
    chat.type("/set temp", TAB, "0.25", ENTER)
    chat.until("  0.25")
    chat.until()
    chat.type("/s", TAB)
    for name in ("/save", "/set", "/stats", "/system"):
        chat.until(name)
    chat.type(CTRL_C)
    chat.until("to leave)")
    chat.until()
    chat.type("/usr", TAB, ENTER)
    chat.until("error: /usr is not a command")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_nothing_is_coloured_and_dumb_terminals_get_lines(terminal: Open, term: str) -> None:
    chat = terminal(TERM=term, NO_COLOR="1")
    chat.until()
    begun = len(chat.raw)
    chat.type("/stats", ENTER)
    chat.until("0 messages")
    chat.until()
    chat.type(CTRL_C)
    chat.until("to leave)")
    chat.until()
    chat.type('"""', ENTER, "Hello", ENTER, '"""', ENTER)
    chat.until("(cut off")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    drawn = chat.raw[begun:]
    assert (b"\x1b" in drawn) == (term == "xterm")
    assert not any(b"\x1b[%d" % code in drawn for code in (*range(30, 38), *range(90, 98)))


ENCODINGS = {
    "C locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
}


@pytest.mark.parametrize(("encoding", "term"), [("C locale", "xterm"), ("C locale", "dumb"), ("ascii", "xterm")])
def test_terminals_without_utf8_can_be_typed_at(terminal: Open, tmp_path: Path, encoding: str, term: str) -> None:
    chat = terminal("--system", "très", "-n", 30, "-t", 2, TERM=term, **ENCODINGS[encoding])
    chat.until()
    chat.type("Noé", ENTER)
    chat.until("(cut off")
    chat.until()
    chat.type(f"/save {tmp_path / 'é'}", ENTER)
    chat.until("(saved 3 messages")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert "Error" not in chat.text
    assert "Traceback" not in chat.text
    (file,) = [path for path in tmp_path.iterdir() if path.name not in ("state",)]
    assert file.name == "é"
    assert said(file) == ["Noé"]
    assert json.loads(file.read_text("utf-8"))["messages"][0]["content"] == "très"


def test_a_question_can_be_answered_or_left_without_losing_the_chat(terminal: Open, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    talk.write_text('{"messages": []}')
    chat = terminal()
    chat.until()
    chat.type("Hello", ENTER)
    chat.until("(cut off")
    for answer, outcome in ((CTRL_C, "error:"), (f"n{ENTER}", "error:"), (f"y{ENTER}", "(saved 2 messages")):
        chat.until()
        chat.type(f"/save {talk}", ENTER)
        chat.until("[y/N]:")
        chat.type(answer)
        chat.until(outcome)
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert said(talk) == ["Hello"]


def test_answers_can_go_elsewhere_while_somebody_types(terminal: Open, tmp_path: Path) -> None:
    with (tmp_path / "answers").open("wb") as file:
        chat = terminal(output=file.fileno())
    chat.until()
    chat.type("Hello", ENTER)
    chat.until("(cut off")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    answers = (tmp_path / "answers").read_bytes()
    assert b">>>" not in answers
    assert b"\x1b" not in answers
    assert answers.strip()


@pytest.mark.parametrize("kind", ["folder", "device"])
@pytest.mark.usefixtures("guarded_devices")
def test_a_history_that_cannot_be_kept_is_one_note(terminal: Open, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "state" / "mlx-mixtral" / "chat-history"
    place.parent.mkdir(parents=True)
    place.mkdir() if kind == "folder" else place.symlink_to("/dev/null")
    mode = Path("/dev/null").stat().st_mode
    chat = terminal()
    assert f"it is a {kind}" in " ".join(chat.until().split())
    chat.type("/stats", ENTER)
    chat.until("0 messages")
    chat.until()
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert chat.text.count("is not remembered") == 1
    assert Path("/dev/null").stat().st_mode == mode
