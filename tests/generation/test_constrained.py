"""Generation under a constraint, against a loop that computes the whole text anew for every token and masks in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import DraftModel, JsonObject, JsonSchema, Mixtral, PromptLookup, Regex, SamplingParams, load
from mlx_mixtral.constraints.base import Constraint, mask_words
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar
from mlx_mixtral.errors import ConstraintError, InvalidRequestError, TokenizerError
from mlx_mixtral.generation.constrained import allowed_tokens

PROMPT = "In the beginning: In the beginning: "
PERSON = JsonSchema(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "of": {"enum": ["Israel", "Egypt"]}},
        "required": ["name", "age", "of"],
        "additionalProperties": False,
    }
)
WORDS = Regex(r"( ?[a-z]{2,9}){3,12}\.")
SPECS = (PERSON, JsonObject(), WORDS, Grammar('start: line+\nline: /[A-Z][a-z ]*/ "\\n"'))


def _naive(model: Mixtral, constraint: Constraint, max_tokens: int, **penalties: float) -> list[int]:
    """Greedy, with a presence penalty if given."""
    prompt = model.tokenizer.encode(PROMPT)
    tokens: list[int] = []
    while len(tokens) < max_tokens and not constraint.is_complete:
        logits = np.array(model.logits([*prompt, *tokens])[-1].astype(mx.float32))
        row = np.zeros(mask_words(logits.size), np.int32)
        constraint.mask_into(row)
        for token in set(tokens):
            logits[token] -= penalties.get("presence_penalty", 0)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: logits.size]
        logits[bits == 0] = -np.inf
        tokens.append(constraint.accept(int(np.argmax(logits))))
    return tokens


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("max_tokens", [22, 34])
def test_tokens_are_those_of_the_naive_loop(short_model: Mixtral, spec: ConstraintSpec, max_tokens: int) -> None:
    compiled = short_model._requests.constraints.compile(spec)
    for penalties in ({}, {"presence_penalty": 2.0}) if spec is PERSON else ({},):
        constraint = compiled.begin(max_tokens)
        expected = _naive(short_model, constraint, max_tokens, **penalties)
        out = short_model.generate(PROMPT, constraint=spec, max_tokens=max_tokens, sampling=SamplingParams(**penalties))
        assert list(out.token_ids) == expected
        is_whole = constraint.is_complete and not constraint.was_cut
        assert out.finish_reason == ("stop" if is_whole else "length")
        # Otherwise taking a forward back would not be tested.
        assert constraint.was_cut or max_tokens > 22 or spec is WORDS


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_speculation_gives_the_same_text(short_model: Mixtral, spec: ConstraintSpec, temperature: float) -> None:
    proposed = 0
    for max_tokens in (22, 44):
        sampling = SamplingParams(temperature=temperature, seed=7, logprobs=1, repetition_penalty=1.1)
        options: dict[str, Any] = {"constraint": spec, "max_tokens": max_tokens, "sampling": sampling}
        plain = short_model.generate(PROMPT, **options)
        looked_up = short_model.generate(PROMPT, speculation=PromptLookup(max_ngram=1, adaptive=False), **options)
        assert looked_up.token_ids == plain.token_ids
        assert looked_up.finish_reason == plain.finish_reason
        assert looked_up.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        assert looked_up.stats.speculation is not None
        proposed += looked_up.stats.speculation.proposed
    assert proposed > 10 or temperature


def test_a_draft_proposes_what_is_allowed(short: Path, short_model: Mixtral) -> None:
    with load(short) as same:
        draft = DraftModel(same, max_tokens=4, adaptive=False)
        for max_tokens in (22, 40):
            plain = short_model.generate(PROMPT, constraint=PERSON, max_tokens=max_tokens)
            drafted = short_model.generate(PROMPT, constraint=PERSON, max_tokens=max_tokens, speculation=draft)
            assert drafted.token_ids == plain.token_ids
            assert drafted.stats.speculation is not None
            # The same model under the same masks is always right, but for what is replaced at the end.
            assert drafted.stats.speculation.acceptance > 0.6
        sampled = short_model.generate(
            PROMPT, constraint=PERSON, max_tokens=40, speculation=draft, sampling=SamplingParams(temperature=1, seed=1)
        )
        assert isinstance(PERSON.document, dict)
        assert json.loads(sampled.text).keys() == PERSON.document["properties"].keys()


def test_streamed_experts_and_processors_give_the_same_text(short: Path, short_model: Mixtral) -> None:
    plain = short_model.generate(PROMPT, constraint=PERSON, max_tokens=40)
    seen: list[int] = []

    def watch(ids: mx.array, logits: mx.array) -> mx.array:
        seen.append(ids.size)
        return logits

    watched = short_model.generate(PROMPT, constraint=PERSON, max_tokens=40, logits_processors=[watch])
    assert watched.token_ids == plain.token_ids
    assert seen == list(range(seen[0], seen[0] + len(plain.token_ids)))
    with load(short, memory=short_model.min_memory_bytes + 400_000) as streamed:
        assert streamed.generate(PROMPT, constraint=PERSON, max_tokens=40).token_ids == plain.token_ids


def test_logprobs_are_the_models_own(short_model: Mixtral) -> None:
    out = short_model.generate(PROMPT, constraint=PERSON, max_tokens=22, sampling=SamplingParams(logprobs=0))
    ids = [*short_model.tokenizer.encode(PROMPT), *out.token_ids]
    logits = short_model.logits(ids).astype(mx.float32)
    logprobs = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    start = len(ids) - len(out.token_ids) - 1
    expected = [logprobs[start + n, token] for n, token in enumerate(out.token_ids)]
    assert out.logprobs == pytest.approx(expected, abs=1e-3)


def test_a_prompt_is_used_again_after_a_constrained_text(short: Path) -> None:
    with load(short) as model:
        first = model.generate(3 * PROMPT, constraint=PERSON, max_tokens=22)
        again = model.generate(3 * PROMPT, constraint=PERSON, max_tokens=22)
        assert again.stats.reused_tokens > 0
        assert again.token_ids == first.token_ids


def test_nothing_but_the_constraint_ends_with_an_error(short_model: Mixtral) -> None:
    barred = {token: float("-inf") for token in range(short_model.tokenizer.vocab_size)}
    stream = short_model.stream(
        PROMPT, constraint=Regex("[0-9]+x"), sampling=SamplingParams(logit_bias=barred), max_tokens=9
    )
    with pytest.raises(ConstraintError, match="cannot follow under the constraint; a logit_bias or a processor"):
        list(stream)
    # The model is free again.
    assert short_model.generate(PROMPT, constraint=Regex("[0-9]x"), max_tokens=9).text[1] == "x"


def test_stop_strings_end_a_text_before_it_is_whole(short_model: Mixtral) -> None:
    out = short_model.generate(PROMPT, constraint=PERSON, max_tokens=60, stop='"')
    assert out.text.strip() == "{"
    assert out.finish_reason == "stop"


def test_an_answer_is_the_text_to_the_character(short: Path) -> None:
    with load(short, chat_template="chatml") as model:
        for pattern in ("[A-Z][a-z]{3,6}", " [a-z]{3}", r"\n[a-z]{3}"):
            answer = model.chat([{"role": "user", "content": "Hi"}], constraint=Regex(pattern), max_tokens=20)
            assert pytest.importorskip("regex").fullmatch(pattern, answer.text), answer.text


def test_what_cannot_be_constrained_is_refused(small_model: Mixtral, short_model: Mixtral) -> None:
    with pytest.raises(TokenizerError):
        small_model.generate([1, 2], constraint=JsonObject())
    with pytest.raises(InvalidRequestError, match="one text at a time"):
        short_model.generate_batch([PROMPT], constraint=JsonObject())
    with pytest.raises(InvalidRequestError, match="JsonSchema, Regex"):
        short_model.generate(PROMPT, constraint={"type": "object"})  # type: ignore[arg-type]


def test_masks_unpack_bit_by_bit() -> None:
    random = np.random.default_rng(3)
    masks = random.integers(-(2**31), 2**31, (3, 4), dtype=np.int32)
    masks[0, 0], masks[1, 3] = -(2**31), -1
    unpacked = np.asarray(allowed_tokens(masks, 100))
    expected = [[int(masks[b, v // 32]) >> (v % 32) & 1 for v in range(100)] for b in range(3)]
    assert unpacked.tolist() == np.array(expected, bool).tolist()
