"""``chat``: scripted through a pipe, what was said kept, files loaded whole or not at all, Ctrl-C stops an answer only."""

from __future__ import annotations

import json
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.cli.chat.session import Session
from mlx_mixtral.cli.chat.settings import AnswerOptions
from mlx_mixtral.cli.options import SamplingOptions

from .conftest import SLOW_READS, SLOW_TOKENS, Invoke, Spawn, assert_one_error

SEED = ("--seed", 1, "-n", 12)


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


def shown(invoke: Invoke, model: Path, *lines: str) -> list[str]:
    """What a session says on stderr to lines that are commands."""
    result = invoke("chat", model, *SEED, "--chat-template", "mistral-v1", input="\n".join(lines))
    assert (result.exit_code, result.stdout) == (0, "")
    return result.stderr.splitlines()


def test_set_lists_every_option_of_an_answer_with_its_value(invoke: Invoke, quantised: Path) -> None:
    values = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown(invoke, quantised, "/set")}
    sampling = {item.name.replace("_", "-") for item in fields(SamplingParams)} - {"logprobs", "dry-sequence-breakers"}
    assert set(values) == sampling | {"max-tokens", "stop", "stop-token-id", "dry-sequence-breaker"}
    wanted = {"temperature": "0.7", "seed": "1", "max-tokens": "12", "stop": "none", "logit-bias": "none"}
    assert {name: values[name] for name in wanted} == wanted
    assert [json.loads(word) for word in values["dry-sequence-breaker"].split()] == ["\n", ":", '"', "*"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("temperature 0.2", "temperature 0.2"),
        ("--temperature=0.2", "temperature 0.2"),
        ("top_k = 4", "top-k 4"),
        ("dry_penalty_last_n -1", "dry-penalty-last-n -1"),
        ("logit-bias 13=-5 14=2", "logit-bias 13=-5.0 14=2.0"),
        ('stop "a b" c', 'stop "a b" "c"'),
        ("stop-token-id 7", "stop-token-id 7"),
        (r'dry-sequence-breaker "\n"', r'dry-sequence-breaker "\n"'),
        ("dry-sequence-breaker none", "dry-sequence-breaker none"),
        ("seed none", "seed none"),
        ("max-tokens 5", "max-tokens 5"),
    ],
)
def test_set_changes_an_option_and_default_brings_it_back(
    invoke: Invoke, quantised: Path, line: str, said: str
) -> None:
    name = said.split()[0]
    before, changed, asked, default = shown(
        invoke, quantised, f"/set {name}", f"/set {line}", f"/set {name}", f"/set {name} default"
    )
    assert " ".join(changed.split()) == said
    assert (asked, default) == (changed, before)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("temperature x", "temperature: 'x' is not a valid float"),
        ("temperature -1", "temperature is -1.0"),
        ("top-p 1.5", "top_p is 1.5"),
        ("top-k 1.5", "top-k: '1.5' is not a valid int"),
        ("top-k 1 2", "takes one value"),
        ("max-tokens 0", "max_tokens is 0"),
        ("seed x", "seed is 'x'"),
        ("stop ''", "stop string ''"),
        ("stop it's", "quotation mark"),
        ("logit-bias x", "'x' is not ID=VALUE"),
        ("temperature none", "'none' is not a valid float"),
        ("temperature=", "takes one value"),
        ("warmth 1", "there is no setting 'warmth'"),
        ("help", "there is no setting 'help'"),
    ],
)
def test_what_cannot_be_set_is_one_line_and_changes_nothing(
    invoke: Invoke, quantised: Path, line: str, named: str
) -> None:
    lines = shown(invoke, quantised, "/set", f"/set {line}", "/set")
    count = (len(lines) - 1) // 2
    assert lines[:count] == lines[-count:]
    assert lines[count].startswith("error: ")
    assert named in lines[count]


def test_what_is_set_is_used_from_then_on(invoke: Invoke, quantised: Path) -> None:
    again = "/undo\nHello\n"
    result = invoke(
        "chat", quantised, "--seed", 1, "-n", 6, "-t", 2, input=f"Hello\n/set temperature 0\n/set max-tokens 8\n{again}"
    )
    with load(quantised) as model:
        hello = [{"role": "user", "content": "Hello"}]
        hot = model.chat(hello, max_tokens=6, sampling=SamplingParams(temperature=2, top_p=0.95, seed=1)).text
        cold = model.chat(hello, max_tokens=8, sampling=SamplingParams()).text
    assert result.stdout == f"{hot}\n{cold}\n"


def test_a_text_of_several_lines_that_begins_with_a_slash_is_a_message(short_model: Mixtral) -> None:
    session = Session(short_model, AnswerOptions(12, SamplingOptions(seed=1)), Conversation())
    for message in ("/usr/bin/ld: no\nsuch file", "/system Be\nbrief."):
        session.handle(message)
    assert session.conversation.messages[0] == {"role": "system", "content": "Be\nbrief."}
    assert session.conversation.messages[1]["content"] == "/usr/bin/ld: no\nsuch file"
