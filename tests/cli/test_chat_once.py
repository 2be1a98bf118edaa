"""``chat -p``: one question and its answer, printed and ended as ``generate`` prints and ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mlx_mixtral import SamplingParams, load

from .conftest import SAYS_IT_BEGAN, SLOW_TOKENS, Invoke, Spawn, assert_one_error

SEED = ("--seed", 1, "-n", 12)


def test_one_question_is_answered_as_the_library_does(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("\ufeffNoé ?\n", "utf-8")
    (tmp_path / "system").write_text("Be brief.\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Noé ?"}]
    with load(quantised) as model:
        wanted = model.chat(messages, max_tokens=12, sampling=SamplingParams(temperature=0.7, top_p=0.95, seed=1))
    one = ("chat", quantised, *SEED, "--system", "Be brief.")
    asked = invoke(*one, "-p", "Noé ?")
    assert (asked.exit_code, asked.stdout) == (0, wanted.text + "\n")
    assert "12 tokens" in asked.stderr.splitlines()[-1]
    assert invoke(*one, "-p", "-", "--no-stats", input="Noé ?\n".encode()).stdout == asked.stdout
    from_files = ("chat", quantised, *SEED, "--system-file", tmp_path / "system", "-f", tmp_path / "prompt", "--json")
    answer = json.loads(invoke(*from_files).stdout)
    assert (answer["text"], answer["token_ids"]) == (wanted.text, list(wanted.token_ids))
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["tokens"] == 12
    word = wanted.text.split()[1]
    stopped = json.loads(invoke(*from_files, "--stop", word).stdout)
    assert (stopped["text"], stopped["finish_reason"]) == (wanted.text[: wanted.text.index(word)], "stop")


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (("-p", "x", "-f", "y"), 2, "either --prompt or --prompt-file"),
        (("-p", "x", "--system", "x", "--system-file", "y"), 2, "either --system or --system-file"),
        (("--json",), 2, "add --prompt"),
        (("-p", " "), None, "the prompt is empty"),
        (("-f", "no-such-file"), None, "no-such-file cannot be read"),
        (("-p", "x", "--system-file", "no-such-file"), None, "no-such-file cannot be read"),
        (("-p", "-"), None, "the prompt on standard input is not UTF-8: byte 0xe9 at offset 2"),
        (("-p", "x", "-n", "0"), None, "--max-tokens is 0"),
        (("-p", "No\udce9"), None, "--prompt is not UTF-8: byte 0xe9 at offset 2"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_before_the_model_is_looked_for(
    invoke: Invoke, flags: tuple[str, ...], status: int | None, named: str
) -> None:
    result = invoke("chat", "no-such-folder", *flags, input="No\xe9".encode("latin-1"))
    if status is None:
        assert_one_error(result, named)
    else:
        assert (result.exit_code, named in result.stderr) == (status, True)


def test_ctrl_c_keeps_the_json_of_one_answer(spawn: Spawn, tiny: Path) -> None:
    flags = ("-p", "Hello", "-n", 900, "--json", "--logit-bias", "2=-100", "--chat-template", "mistral-v1")
    process = spawn("chat", tiny, *flags, before=SLOW_TOKENS + SAYS_IT_BEGAN)
    assert process.stderr is not None
    assert process.stderr.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted\n")
    answer = json.loads(out)
    assert answer["finish_reason"] == "cancelled"
    assert 0 < len(answer["token_ids"]) < 900
