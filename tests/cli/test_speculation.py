"""``--speculate`` and ``--draft``: the same text, figures of what was accepted, and drafts that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_mixtral import load

from .conftest import Invoke, assert_one_error

PROMPT = (
    "And the LORD said unto Moses, Speak unto the children of Israel, and say unto them: Speak unto the children of"
)
LLAMA = Path(__file__).parents[1] / "goldens" / "transformers" / "llama"


@pytest.mark.parametrize("flags", [("--speculate", "lookup"), ("--draft", "MODEL")])
def test_text_is_the_same_and_json_says_what_was_accepted(
    invoke: Invoke, quantised: Path, flags: tuple[str, str]
) -> None:
    name, value = flags
    value = str(quantised) if value == "MODEL" else value
    plain = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 24, "--json").stdout)
    answer = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 24, "--json", name, value).stdout)
    assert (answer["text"], answer["token_ids"]) == (plain["text"], plain["token_ids"])
    added = answer["stats"].keys() - plain["stats"].keys()
    assert added == {"forwards", "tokens_per_forward", "proposed_tokens", "accepted_tokens", "acceptance"}
    assert answer["stats"]["forwards"] <= 23


def test_the_stats_line_tells_tokens_a_forward(invoke: Invoke, quantised: Path) -> None:
    result = invoke("generate", quantised, "-p", PROMPT, "-n", 24, "--speculate", "lookup")
    assert "speculation: " in result.stderr
    assert " tokens per forward pass" in result.stderr
    assert "speculation" not in invoke("generate", quantised, "-p", PROMPT, "-n", 24).stderr


def test_chat_speculates(invoke: Invoke, quantised: Path) -> None:
    talk = ("chat", quantised, "-t", 0, "-n", 12)
    plain = invoke(*talk, input="Hello, hello, hello\n")
    for flags in (("--speculate", "lookup"), ("--draft", quantised)):
        result = invoke(*talk, *flags, input="Hello, hello, hello\n/stats\n")
        assert result.exit_code == 0
        assert result.stdout == plain.stdout
        assert "tokens per forward pass" in result.stderr


def test_a_drafts_memory_is_part_of_the_budget(invoke: Invoke, quantised: Path) -> None:
    with load(quantised) as model:
        everything, least = model.residency.plan.resident_bytes, model.min_memory_bytes
    arguments = ("generate", quantised, "-p", PROMPT, "-n", 8, "--json", "--draft", quantised, "--memory")
    whole = json.loads(invoke(*arguments, 2 * everything).stdout)
    streamed = json.loads(invoke(*arguments, everything + least).stdout)
    assert "hit_rate" not in whole["stats"]
    assert "hit_rate" in streamed["stats"]
    assert streamed["text"] == whole["text"]
    assert_one_error(invoke(*arguments, everything + least - 1), "a budget of", "is too small")
    assert_one_error(invoke(*arguments, everything), "the draft model alone takes")


def test_drafts_that_cannot_be_used_are_one_line(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    for command in (("generate", quantised, "-p", "Hi"), ("chat", quantised)):
        assert_one_error(invoke(*command, "--draft", LLAMA), "the draft has a vocabulary of")
        assert_one_error(invoke(*command, "--draft", tmp_path))
        assert invoke(*command, "--draft", quantised, "--speculate", "lookup").exit_code == 2
        assert invoke(*command, "--speculate", "magic").exit_code == 2
