"""``chat``: scripted through a pipe, what was said kept, files loaded whole or not at all, Ctrl-C stops an answer only."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path

import pytest

from mlx_mixtral import SamplingParams, load

from .conftest import SLOW_READS, SLOW_TOKENS, Invoke, Spawn, assert_one_error

SEED = ("--seed", 1, "-n", 12)
# Ctrl-C is a signal to the processes whose controlling terminal it is typed at.
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
PASTE_MODE = re.compile(r"\x1b\[\?2004[hl]")


def test_answers_are_the_librarys_and_each_turn_sees_the_ones_before(invoke: Invoke, quantised: Path) -> None:
    sampling = SamplingParams(temperature=0.7, top_p=0.95, seed=1)
    with load(quantised) as model:
        first = model.chat([{"role": "user", "content": "Hello"}], sampling=sampling, max_tokens=12).text
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.strip()},
            {"role": "user", "content": "Go on"},
        ]
        second = model.chat(messages, sampling=sampling, max_tokens=12).text
    result = invoke("chat", quantised, *SEED, input="Hello\nGo on\n")
    assert result.exit_code == 0
    assert result.stdout == "".join(text if text.endswith("\n") else text + "\n" for text in (first, second))


def test_no_prompts_and_no_bars_without_a_terminal(invoke: Invoke, quantised: Path) -> None:
    result = invoke("chat", quantised, *SEED, input="/help\n/exit\nnever sent\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert ">>>" not in result.stderr
    assert "/reset" in result.stderr


def test_saved_conversations_are_loaded_again(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    saved, again = tmp_path / "a talk.json", tmp_path / "again.json"
    talk = f"/system Be brief.\nHello\n/save {saved}\n/reset\n/save {again}\n"
    assert invoke("chat", quantised, *SEED, input=talk).exit_code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert (messages[0]["content"], messages[1]["content"]) == ("Be brief.", "Hello")
    assert [m["role"] for m in json.loads(again.read_text())["messages"]] == ["system"]

    # In a new session: the same file comes out again, and the next turn continues it.
    result = invoke(
        "chat", quantised, *SEED, input=f"/load {saved}\n/save --overwrite {again}\nGo on\n/undo\n/save {saved}\n"
    )
    assert "loaded 3 messages" in result.stderr
    assert json.loads(again.read_text())["messages"] == messages
    assert json.loads(saved.read_text())["messages"] == messages
    with load(quantised) as model:
        sampling = SamplingParams(temperature=0.7, top_p=0.95, seed=1)
        wanted = model.chat([*messages, {"role": "user", "content": "Go on"}], sampling=sampling, max_tokens=12).text
    assert result.stdout.strip() == wanted.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a talk.json", "again.json"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not json", "not valid JSON"),
        (b"{}", "no list of messages"),
        (b'{"messages": [{"role": "oracle", "content": "x"}]}', "'oracle'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "has no answer"),
    ],
)
def test_a_bad_file_is_one_line_and_changes_nothing(
    invoke: Invoke, quantised: Path, tmp_path: Path, content: bytes, named: str
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    result = invoke(
        "chat", quantised, *SEED, input=f"/system Stay.\n/load {tmp_path}/bad.json\n/save {tmp_path}/kept\n"
    )
    assert result.exit_code == 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert named in errors[0]
    assert json.loads((tmp_path / "kept").read_text())["messages"] == [{"role": "system", "content": "Stay."}]


def test_commands_that_cannot_be_carried_out_keep_the_session(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    commands = (
        f"/save\n/load\n/save {tmp_path}/no/folder\n/load {tmp_path}/absent\n/save {tmp_path}\n/what\n/undo\n/stats\n"
    )
    result = invoke("chat", quantised, *SEED, input=commands + "\n \nHello\n")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 6
    assert result.exit_code == 0
    assert result.stdout != ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_lines_make_one_message(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["one\\", "two", '"""', "three", "", "  four", '"""', '"""five', 'six"""', " /reset", f"/save {saved}"]
    invoke("chat", quantised, *SEED, input="\n".join(lines) + "\n")
    said = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert said == ["one\ntwo", "three\n\n  four", "five\nsix", "/reset"]


def test_a_line_that_is_not_utf8_is_not_sent(invoke: Invoke, quantised: Path) -> None:
    result = invoke("chat", quantised, *SEED, input="Noé\n".encode("latin-1") + b"/stats\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "0xe9 at offset 2" in result.stderr
    assert "0 messages" in result.stderr


def test_a_conversation_past_the_context_says_so_and_goes_on(invoke: Invoke, quantised: Path) -> None:
    result = invoke("chat", quantised, *SEED, input="x " * 1100 + "\n/stats\nHello\n")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "1024" in errors[0]
    assert "/reset" in errors[0]
    assert "0 messages" in result.stderr
    assert result.stdout != ""


def test_models_that_cannot_chat_are_refused_before_anything_is_typed(invoke: Invoke, without_tokenizer: Path) -> None:
    assert_one_error(invoke("chat", without_tokenizer, input="Hello\n"), "tokenizer")
    assert_one_error(invoke("chat", "no-such-folder", "--top-p", "1.5", input="Hello\n"), "--top-p is 1.5")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(spawn: Spawn, tiny: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    options = ("--seed", 1, "-n", 900, "--logit-bias", "2=-100")
    process = spawn("chat", tiny, *options, env={"PYTHONIOENCODING": "utf-8"}, before=SLOW_TOKENS)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(f"/stats\n/save {saved}\n".encode(), timeout=30)
    assert process.returncode == 0
    assert b"stopped; what was said so far is kept" in err
    assert b"2 messages" in err
    messages = json.loads(saved.read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "Hello"}
    assert messages[1]["content"] == (begun + out).decode().strip()


def test_ctrl_c_while_waiting_for_piped_input_or_loading_ends_with_130(spawn: Spawn, tiny: Path) -> None:
    process = spawn("chat", tiny, "-n", 4, "--chat-template", "mistral-v1")
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    # The note after the answer: the model is done and the next line is waited for.
    assert b"cut off" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted\n")

    loading = spawn("chat", tiny, before=SLOW_READS)
    assert loading.stderr is not None
    assert loading.stderr.readline() == b"reading\n"
    loading.send_signal(signal.SIGINT)
    out, err = loading.communicate(timeout=30)
    assert (loading.returncode, out) == (130, b"")
    assert err.replace(b"reading\n", b"") == b"interrupted\n"


def test_on_a_terminal_ctrl_c_clears_the_line_and_twice_leaves(spawn: Spawn, tiny: Path) -> None:
    """Through a pseudo-terminal, as typed: \\x03 is Ctrl-C, \\x04 Ctrl-D."""
    for keys, status in ((["\x04"], 0), (["half a line\x03", "\x04"], 0), (["\x03", "\x03"], 130)):
        screen, returned = _type_at_a_terminal(spawn, tiny, keys)
        assert returned == status, screen
        assert "Traceback" not in screen
        assert "/help for help" in screen


def _type_at_a_terminal(spawn: Spawn, model: Path, keys: list[str]) -> tuple[str, int]:
    terminal, theirs = pty.openpty()
    sizes = {"TERM": "xterm", "COLUMNS": "80"}
    process = spawn(
        "chat",
        model,
        before=OWN_TERMINAL,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=sizes,
        start_new_session=True,
    )
    os.close(theirs)
    screen = ""
    try:
        for key in keys:
            screen += _read_until(terminal, ">>> ")
            # A key in the instant between the prompt and readline's wait would be taken up with the next one only.
            time.sleep(0.3)
            os.write(terminal, key.encode())
        screen += _read_until(terminal, None)
        return screen, process.wait(timeout=30)
    finally:
        os.close(terminal)


def _read_until(terminal: int, mark: str | None) -> str:
    """What the terminal shows until it ends with ``mark`` (a prompt), or until the program ends."""
    seen = ""
    while mark is None or not PASTE_MODE.sub("", seen).endswith(mark):
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"nothing more after {seen!r}"
        try:
            data = os.read(terminal, 1024)
        except OSError:  # Linux says so when the other side is gone
            data = b""
        if not data:
            break
        seen += data.decode(errors="replace")
    return seen


def test_a_guessed_format_is_said_and_another_can_be_given(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    noted = invoke("chat", quantised, *SEED, input="Hello\n")
    notes = [line for line in noted.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: there is no chat template; mistral-v1 is assumed: --chat-template FILE or NAME selects another"
    ]
    named = invoke("chat", quantised, *SEED, "--chat-template", "mistral-v1", input="Hello\n")
    assert (named.stdout, "note: " in named.stderr) == (noted.stdout, False)
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[-1].content }} and", "utf-8")
    given = invoke("chat", quantised, "-n", 8, "-t", 0, "--chat-template", tmp_path / "mine.jinja", input="Hello\n")
    completed = invoke("generate", quantised, "-p", "<s>Hello and", "-n", 8)
    assert given.stdout.strip() == completed.stdout.strip()


def test_an_answer_stops_at_what_is_given(invoke: Invoke, quantised: Path) -> None:
    greedy = ("chat", quantised, "-t", 0, "-n", 12)
    free = invoke(*greedy, input="Hello\n").stdout
    word = free.split()[2]
    assert invoke(*greedy, "--stop", word, input="Hello\n").stdout.strip() == free[: free.index(word)].strip()
    with load(quantised) as model:
        ids = model.chat([{"role": "user", "content": "Hello"}], sampling=SamplingParams(), max_tokens=12).token_ids
        third = model.tokenizer.decode(ids[: ids.index(ids[2])])
    stopped = invoke(*greedy, "--stop-token-id", ids[2], input="Hello\n").stdout
    assert stopped.strip() == third.strip()
    assert invoke("chat", "no-such-folder", "--stop", "").stderr.startswith("error: --stop string ''")
