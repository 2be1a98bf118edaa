"""Answers against those of lm_eval's own backend for Hugging Face models, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.harness.responder import Responder
from mlx_mixtral.evaluation.harness.scoring import Answer

from .support import GOLDEN, requests_and_answers

TOLERANCE = 1e-3
LENGTH = GOLDEN["max_length"]
MULTIPLE_CHOICE = ("tiny_arithmetic", "tiny_endings")
GENERATED = ("tiny_sums", "tiny_stories")


def assert_close(found: list[Answer], recorded: list[Any]) -> None:
    assert [answer.is_greedy for answer in found] == [is_greedy for _, is_greedy in recorded]
    assert [answer.logprob for answer in found] == pytest.approx([value for value, _ in recorded], abs=TOLERANCE)


def test_single_log_likelihoods_equal_the_recorded_ones_and_cut_contexts_are_counted(model: Mixtral) -> None:
    responder = Responder(model, max_length=LENGTH)
    recorded = GOLDEN["pairs"]
    assert_close(responder.loglikelihood([tuple(pair) for pair in recorded["requests"]]), recorded["answers"])
    assert responder.truncated == 2


@pytest.mark.parametrize("batch_size", [3, 64])
def test_choices_of_tasks_equal_the_recorded_ones_whatever_the_batch(model: Mixtral, batch_size: int) -> None:
    asked: list[Any] = []
    recorded: list[Any] = []
    for name in MULTIPLE_CHOICE:
        requests, answers = requests_and_answers(GOLDEN["tasks"][name])
        asked += requests[:24]
        recorded += answers[:24]
    assert_close(Responder(model, batch_size=batch_size, max_length=LENGTH).loglikelihood(asked), recorded)


def test_a_shared_context_is_read_once(model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    hidden, remember = type(model.module).hidden, type(model.module).remember

    def counted(original: Any) -> Any:
        def run(self: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal read
            read += tokens.size
            return original(self, tokens, *arguments, **options)

        return run

    monkeypatch.setattr(type(model.module), "hidden", counted(hidden))
    monkeypatch.setattr(type(model.module), "remember", counted(remember))
    context = "In the beginning God created the heaven and the earth. And the earth was without form, and"
    responder = Responder(model, max_length=LENGTH)
    length = len(responder.encoder.prompt(context))
    responder.loglikelihood([(context, " void"), (context, " good"), (context, " it"), (context, " the")])
    assert length <= read < length + 16


def test_a_whole_text_has_one_bos_and_every_token_is_predicted_once(model: Mixtral) -> None:
    recorded = GOLDEN["rolling"]
    found = Responder(model, max_length=LENGTH).loglikelihood_rolling(recorded["requests"])
    assert found == pytest.approx(recorded["answers"], abs=TOLERANCE)
    assert all(abs(one - two) > 1 for one, two in zip(found, recorded["two_bos"], strict=True))


def test_windows_of_a_short_context_equal_a_plain_loop(model: Mixtral) -> None:
    text, size = GOLDEN["rolling"]["requests"][2], 20
    ids = [1, *model.tokenizer.encode(text, bos=False)]
    expected, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + size, len(ids) - 1)
        start = max(0, end - size)
        logits = model.logits(ids[start:end])
        for at in range(done + 1, end + 1):
            row = logits[at - 1 - start]
            expected += (row[ids[at]] - row.logsumexp()).item()
        done = end
    assert Responder(model, max_length=size).loglikelihood_rolling([text]) == pytest.approx([expected], abs=TOLERANCE)


def test_an_empty_text_has_probability_one(model: Mixtral) -> None:
    told: list[tuple[int, float]] = []
    assert Responder(model, max_length=LENGTH).loglikelihood_rolling([""], lambda *answer: told.append(answer)) == [0.0]
    assert told == [(0, 0.0)]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_generated_texts_equal_the_recorded_ones(model: Mixtral, batch_size: int) -> None:
    responder = Responder(model, batch_size=batch_size, max_length=LENGTH)
    recorded = GOLDEN["generations"]
    assert responder.generate_until([tuple(request) for request in recorded["requests"]]) == recorded["answers"]
    assert responder.truncated == 1


def test_generated_texts_of_tasks_equal_the_recorded_ones(model: Mixtral) -> None:
    for name in GENERATED:
        requests, answers = requests_and_answers(GOLDEN["tasks"][name])
        assert Responder(model, max_length=LENGTH).generate_until(requests) == answers


def test_sampling_is_the_same_in_every_run_and_another_text_each_time_it_is_asked(model: Mixtral) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    found = Responder(model, max_length=LENGTH).generate_until([("And God said", settings)] * 3)
    assert len(set(found)) == 3
    again = Responder(model, max_length=LENGTH).generate_until([("And God said", settings)] * 3, known={1: found[1]})
    assert again == found


def test_known_answers_are_given_back_and_not_computed(model: Mixtral) -> None:
    told: list[int] = []
    pairs = [("And God", " said"), ("And God", " saw"), ("", "Amen.")]
    responder = Responder(model, max_length=LENGTH)
    found = responder.loglikelihood(pairs, lambda index, _: told.append(index), {1: Answer(-7.0, True)})
    assert found[1] == Answer(-7.0, True)
    assert sorted(told) == [0, 2]
    assert responder.loglikelihood_rolling(["Amen.", "And God"], known={0: -1.0, 1: -2.0}) == [-1.0, -2.0]


@pytest.fixture(scope="module")
def budgeted(tiny: Path) -> Iterator[Mixtral]:
    with load(tiny, context=256) as probe:
        least = probe.min_memory_bytes
    with load(tiny, memory=least + 2**20, context=256) as loaded:
        yield loaded


def test_a_memory_budget_bounds_the_context_and_changes_no_answer(budgeted: Mixtral, model: Mixtral) -> None:
    responder = Responder(budgeted)
    assert responder.max_length < model.config.max_position_embeddings
    requests, answers = requests_and_answers(GOLDEN["tasks"]["tiny_endings"])
    assert_close(responder.loglikelihood(requests), answers)


def test_a_window_of_attention_is_honoured(tiny: Path) -> None:
    context = GOLDEN["rolling"]["requests"][2]
    pairs = [(context, " Dieu"), (context, " la terre")]
    with load(tiny, kv_size=64) as bounded:
        found = Responder(bounded).loglikelihood(pairs)
        alone = [Responder(bounded).loglikelihood([pair])[0] for pair in pairs]
    assert [answer.logprob for answer in found] == pytest.approx([answer.logprob for answer in alone], abs=1e-4)


def test_a_continuation_needs_a_token_and_room(model: Mixtral) -> None:
    responder = Responder(model, max_length=8)
    with pytest.raises(InvalidRequestError, match="adds no token to its context 'And God'"):
        responder.loglikelihood([("And God", "")])
    with pytest.raises(ContextLengthError, match="the model's context holds 8"):
        responder.loglikelihood([("And", " God said, Let there be light: and there was light.")])
    with pytest.raises(ContextLengthError, match="asks for up to 8 tokens; the model's context holds 8"):
        responder.generate_until([("And", {"max_gen_toks": 8})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"max_length": 1025}, "max_length is 1025 tokens; the model's context holds 1024"),
    ],
)
def test_arguments_out_of_range_are_refused(model: Mixtral, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Responder(model, **options)
