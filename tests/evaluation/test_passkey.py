"""Passkeys: prompts of the asked length with the key where it was asked for; the heat map shows just what a model can."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_mixtral import Mixtral, Tokenizer
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.journal import Journal
from mlx_mixtral.evaluation.passkey import (
    ANSWER_TOKENS,
    PasskeyPrompt,
    PasskeyResult,
    default_lengths,
    make_prompt,
    passkey,
    run_passkey,
)
from mlx_mixtral.evaluation.plots import draw_long_context
from mlx_mixtral.evaluation.results import LengthBucket

RECORDED_KEYS = ["57399", "34551"]
LENGTHS, DEPTHS = (200, 400, 1000), (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer(model: Mixtral) -> Tokenizer:
    return model.tokenizer


def grid(tokenizer: Tokenizer, answer: Callable[[PasskeyPrompt], str], **options: int) -> PasskeyResult:
    return run_passkey(answer, tokenizer, LENGTHS, DEPTHS, limit=1024, **options)


def hidden(prompt: PasskeyPrompt) -> str:
    """What a model that reads all of the prompt would say; an oracle of its own, by the words around the key."""
    found = re.search(r"The pass key is (\d+)\. Remember it", prompt.text)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_fills_its_length_and_hides_the_key_at_its_depth(
    tokenizer: Tokenizer, length: int, depth: float
) -> None:
    prompt = make_prompt(tokenizer, length, depth, seed=5)
    assert list(prompt.token_ids) == tokenizer.encode(prompt.text)
    assert length - 40 < len(prompt.token_ids) + ANSWER_TOKENS <= length
    assert prompt.text.count(prompt.key) == 2
    assert hidden(prompt) == prompt.key
    assert prompt.text.endswith("What is the pass key? The pass key is")
    parts = prompt.text.split(f"The pass key is {prompt.key}.")
    before, after = (part.count(".") - own for part, own in zip(parts, (3, 2), strict=True))  # but for task and key
    assert before + after == prompt.sentences
    assert before / prompt.sentences == pytest.approx(depth, abs=0.6 / prompt.sentences)


def test_prompts_follow_from_their_seed(tokenizer: Tokenizer) -> None:
    assert make_prompt(tokenizer, 300, 0.5, 1) == make_prompt(tokenizer, 300, 0.5, 1)
    assert make_prompt(tokenizer, 300, 0.5, 1).key != make_prompt(tokenizer, 300, 0.5, 2).key
    # Recorded: another Python or machine must ask the same.
    asked: list[str] = []
    run_passkey(lambda prompt: asked.append(prompt.key) or "", tokenizer, [200], [0.0, 1.0], limit=1024)  # type: ignore[func-returns-value]
    assert asked == RECORDED_KEYS


def test_a_model_that_always_or_never_answers(tokenizer: Tokenizer) -> None:
    always = grid(tokenizer, lambda prompt: f" {hidden(prompt)}. The grass is green. 12345")
    assert always.found == ((1.0, 1.0, 1.0),) * 3
    assert always.accuracy == 1.0
    for text in ("", " not a number", " 00000", " the key 1"):
        assert grid(tokenizer, lambda prompt, text=text: text).found == ((0.0, 0.0, 0.0),) * 3


def test_a_longer_number_or_a_later_one_is_no_answer(tokenizer: Tokenizer) -> None:
    assert grid(tokenizer, lambda prompt: f" {hidden(prompt)}1").accuracy == 0
    assert grid(tokenizer, lambda prompt: f" 1 or {hidden(prompt)}").accuracy == 0


def test_the_heat_map_shows_just_the_cells_a_model_can(tokenizer: Tokenizer) -> None:
    """It sees the last 300 tokens only: everything of the short prompt, of longer ones what stands at the end."""

    def short_sighted(prompt: PasskeyPrompt) -> str:
        seen = tokenizer.decode(prompt.token_ids[-300:])
        found = re.search(r"(\d+) is the pass key", seen)
        return found.group(1) if found else " lost"

    found = grid(tokenizer, short_sighted)
    assert found.found == ((1, 1, 1), (0, 1, 1), (0, 0, 1))
    assert found.accuracy == pytest.approx(6 / 9)
    assert found.to_dict()["found"] == found.found


def test_a_share_of_trials(tokenizer: Tokenizer) -> None:
    """It knows keys that end in an even digit: the share of each cell is that of its keys."""
    keys: dict[tuple[int, float], list[str]] = {}

    def even(prompt: PasskeyPrompt) -> str:
        length = min(length for length in LENGTHS if len(prompt.token_ids) <= length)
        depth = round(prompt.before / prompt.sentences, 1)
        keys.setdefault((length, depth), []).append(prompt.key)
        return prompt.key if int(prompt.key) % 2 == 0 else ""

    found = grid(tokenizer, even, trials=4)
    assert all(len(set(group)) == 4 for group in keys.values())
    for row, length in zip(found.found, LENGTHS, strict=True):
        for share, depth in zip(row, DEPTHS, strict=True):
            assert share == sum(int(key) % 2 == 0 for key in keys[length, depth]) / 4
    assert 0 < found.accuracy < 1


def test_an_interrupted_grid_goes_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked: list[str] = []

    def until(most: int) -> Callable[[PasskeyPrompt], str]:
        def answer(prompt: PasskeyPrompt) -> str:
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(prompt.key)
            return prompt.key

        return answer

    place = tmp_path / "journal"
    journal = Journal(place, {})
    with pytest.raises(KeyboardInterrupt):
        run_passkey(until(4), tokenizer, LENGTHS, DEPTHS, limit=1024, journal=journal)
    found = run_passkey(until(9), tokenizer, LENGTHS, DEPTHS, limit=1024, journal=Journal(place, {}))
    assert len(asked) == len(set(asked)) == 9
    assert found.accuracy == 1


def test_what_cannot_be_asked_is_refused_before_the_first_prompt(tokenizer: Tokenizer) -> None:
    def never(prompt: PasskeyPrompt) -> str:
        raise AssertionError("asked")

    with pytest.raises(ContextLengthError, match="of 1025 tokens was asked for; the model's context holds 1024"):
        run_passkey(never, tokenizer, [200, 1025], limit=1024)
    for lengths, depths, options, message in (
        ([30], [0.5], {}, r"of 30 tokens has no room for filler; at least \d+ are needed"),
        ([], [0.5], {}, "lengths is empty"),
        ([200], [], {}, "depths is empty"),
        ([200], [1.5], {}, r"a depth is 1\.5"),
        ([200], [float("nan")], {}, "a depth is nan"),
        ([-1], [0], {}, "a length is -1"),
        ([200], [0], {"trials": 0}, "trials is 0"),
        ("200", [0], {}, "lengths is '200', of type str"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            run_passkey(never, tokenizer, lengths, depths, limit=1024, **options)  # type: ignore[arg-type]


def test_default_lengths_double_up_to_the_context() -> None:
    assert default_lengths(32768) == (1024, 2048, 4096, 8192, 16384, 32768)
    assert default_lengths(1024) == (256, 512, 1024)
    assert default_lengths(100) == (100,)


def test_a_small_model_is_asked_and_finds_nothing(model: Mixtral) -> None:
    found = passkey(model, [128], [0.5])
    assert found.found == ((0.0,),)
    with pytest.raises(ContextLengthError):
        passkey(model, [2048])


def test_the_plot_is_a_png() -> None:
    pytest.importorskip("matplotlib")
    found = PasskeyResult((256, 512), (0.0, 1.0), ((1.0, 0.5), (0.0, 1.0)), 2, 0)
    buckets = [LengthBucket(1, 32, 100, 9.0, 0.5), LengthBucket(33, 64, 100, 7.0, 0.4)]
    both, one = draw_long_context("a model", found, buckets), draw_long_context("a model", found, [])
    assert both != one
    assert all(image.startswith(b"\x89PNG\r\n") for image in (both, one))
