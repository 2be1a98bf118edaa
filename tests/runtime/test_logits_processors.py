"""Functions of the caller's own over logits, and the samplers that need the tokenizer, in all ways to generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import DraftModel, Mixtral, PromptLookup, SamplingParams, load
from mlx_mixtral.errors import InvalidRequestError, TokenizerError
from mlx_mixtral.generation.processors import LogitsProcessor

PROMPT = [5, 9, 30, 31, 5, 9, 30]
REPEATING = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 1.0})


@pytest.fixture(scope="module")
def draft(small: Path) -> Iterator[Mixtral]:
    with load(small, experts_per_token=1) as model:
        yield model


class Watching:
    """Bans every token of the parity of the last one, and remembers what it was given."""

    def __init__(self, vocab: int) -> None:
        self.ids: list[list[int]] = []
        self.logits: list[np.ndarray[Any, Any]] = []
        self._odd = mx.array(np.arange(vocab) % 2 == 1)

    def __call__(self, ids: mx.array, logits: mx.array) -> mx.array:
        seen = ids.tolist()
        assert isinstance(seen, list)
        self.ids.append(seen)
        self.logits.append(np.asarray(logits))
        return mx.where(self._odd == bool(seen[-1] % 2), -mx.inf, logits)


def _by_hand(model: Mixtral, params: SamplingParams, count: int) -> list[int]:
    """Greedy tokens of alternating parity, one forward over everything for each."""
    text: list[int] = []
    for _ in range(count):
        logits = np.asarray(model.logits([*PROMPT, *text]))[-1].astype(np.float64)
        for token in {*PROMPT, *text}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in text:
            logits[token] -= params.frequency_penalty
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        logits[[*PROMPT, *text][-1] % 2 :: 2] = -np.inf
        text.append(int(logits.argmax()))
    return text


@pytest.mark.parametrize("way", ["plain", "again", "lookup", "draft", "batch"])
def test_every_way_to_generate_calls_them(small_model: Mixtral, draft: Mixtral, way: str) -> None:
    """Greedy text with penalties and a function, against one computed by hand; with a kept prefix the second time."""
    wanted = _by_hand(small_model, REPEATING, 10)
    watching = Watching(small_model.config.vocab_size)
    options: dict[str, Any] = {"max_tokens": 10, "sampling": REPEATING, "logits_processors": [watching]}
    if way == "batch":
        outs = small_model.generate_batch([PROMPT, PROMPT[:3]], **options)
        assert list(outs[0].token_ids) == wanted
        alone = small_model.generate(PROMPT[:3], **options)
        assert outs[1].token_ids == alone.token_ids
        return
    if way == "lookup":
        options["speculation"] = PromptLookup(max_ngram=1, adaptive=False)
    if way == "draft":
        options["speculation"] = DraftModel(draft, max_tokens=3, adaptive=False)
    assert list(small_model.generate(PROMPT, **options).token_ids) == wanted
    whole = [*PROMPT, *wanted]
    if way in ("plain", "again"):
        assert watching.ids == [whole[: len(PROMPT) + made] for made in range(10)]
        assert {array.dtype for array in watching.logits} == {np.dtype(np.float32)}
    else:  # tokens that were proposed are seen too; every token of the text was asked for
        assert all(whole[: len(PROMPT) + made] in watching.ids for made in range(10))


def test_they_come_one_after_the_other_and_before_the_temperature(small_model: Mixtral) -> None:
    def only(token: int) -> LogitsProcessor:
        keep = mx.array(np.where(np.arange(small_model.config.vocab_size) == token, 0.0, -np.inf).astype(np.float32))
        return lambda ids, logits: logits + keep

    def raised(ids: mx.array, logits: mx.array) -> mx.array:
        logits[11] = 1000.0  # into the array it is given: nobody else's
        return logits

    sampling = SamplingParams(temperature=1.3, top_k=5, seed=1, logprobs=1)
    out = small_model.generate(PROMPT, max_tokens=3, sampling=sampling, logits_processors=[raised, only(40)])
    assert out.token_ids == (40, 40, 40)
    assert out.logprobs is not None
    # Log-probabilities stay the model's own.
    own = np.asarray(small_model.logits(PROMPT))[-1].astype(np.float64)
    assert out.logprobs[0] == pytest.approx(own[40] - np.log(np.exp(own - own.max()).sum()) - own.max(), abs=1e-3)
    assert small_model.generate(PROMPT, max_tokens=2, logits_processors=(raised,)).token_ids == (11, 11)
    plain = small_model.generate(PROMPT, max_tokens=4)
    assert small_model.generate(PROMPT, max_tokens=4, logits_processors=[]).token_ids == plain.token_ids


def test_each_prompt_of_a_batch_can_have_its_own(small_model: Mixtral) -> None:
    def forcing(token: int) -> LogitsProcessor:
        return lambda ids, logits: mx.where(mx.arange(logits.size) == token, 100.0, logits)

    outs = small_model.generate_batch(
        [PROMPT, PROMPT[:4], PROMPT[:5]], max_tokens=2, logits_processors=[[forcing(3)], [], [forcing(4)]]
    )
    assert [out.token_ids for out in outs] == [
        (3, 3), small_model.generate(PROMPT[:4], max_tokens=2).token_ids, (4, 4)
    ]  # fmt: skip
    with pytest.raises(InvalidRequestError, match="has 1 lists for 2 prompts"):
        small_model.generate_batch([PROMPT, PROMPT], logits_processors=[[forcing(3)]])


def test_a_token_that_ends_the_text_is_the_last_they_see(small_model: Mixtral) -> None:
    """Nothing is computed ahead of a function that wants to know."""
    third = small_model.generate(PROMPT, max_tokens=3).token_ids[2]
    seen: list[int] = []

    def counting(ids: mx.array, logits: mx.array) -> mx.array:
        seen.append(ids.size)
        return logits

    options: dict[str, Any] = {"max_tokens": 9, "stop_token_ids": [third], "logits_processors": [counting]}
    lookup = PromptLookup(max_ngram=1)
    for ended in (
        lambda: small_model.generate(PROMPT, **options),
        lambda: small_model.generate(PROMPT, **options, speculation=lookup),
        lambda: small_model.generate_batch([PROMPT], **options)[0],
    ):
        out = ended()
        assert out.finish_reason == "stop"
        assert seen == [len(PROMPT) + made for made in range(len(out.token_ids))]
        seen.clear()


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda ids, logits: logits[None], r"\[1\] returned shape \[1, 256\]; it must return .* \[256\]"),
        (lambda ids, logits: logits[:-1], r"returned shape \[255\]"),
        (lambda ids, logits: None, r"returned NoneType; it must return an mlx array \[256\]"),
        (lambda ids, logits: np.asarray(logits), "returned ndarray"),
        (lambda ids, logits: logits.astype(mx.int32), "int32; it must return floating-point"),
        (lambda ids, logits: logits * mx.nan, "returned NaN or inf"),
        (lambda ids, logits: logits + mx.inf, "returned NaN or inf"),
        (lambda ids, logits: logits - mx.inf, "returned -inf for every token"),
    ],
)
def test_what_is_no_logits_is_named(small_model: Mixtral, result: LogitsProcessor, said: str) -> None:
    fine: LogitsProcessor = lambda ids, logits: logits.astype(mx.bfloat16)  # noqa: E731
    with pytest.raises(InvalidRequestError, match=said):
        small_model.generate(PROMPT, max_tokens=2, logits_processors=[fine, result])
    # The model is free, and what was computed until then is not kept as if it were whole.
    assert len(small_model.generate(PROMPT, max_tokens=2).token_ids) == 2


@pytest.mark.parametrize("given", [len, "abc", [3], {"a": 1}, [None]], ids=repr)
def test_what_is_no_list_of_functions_is_refused(small_model: Mixtral, given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="logits_processors"):
        small_model.generate(PROMPT, max_tokens=1, logits_processors=given)


def test_an_error_of_a_function_is_the_callers(small_model: Mixtral) -> None:
    def failing(ids: mx.array, logits: mx.array) -> mx.array:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        small_model.generate(PROMPT, max_tokens=1, logits_processors=[failing])
    assert small_model.generate(PROMPT, max_tokens=1).token_ids


def test_dry_stops_a_loop_and_breakers_allow_it(short_model: Mixtral) -> None:
    """Forced to say the same by a bias, until DRY weighs more."""
    line = short_model.tokenizer.encode("the LORD said", bos=False)
    bias = dict.fromkeys(line, 60.0)
    looping = short_model.generate("the LORD said", max_tokens=24, sampling=SamplingParams(logit_bias=bias))
    dry = SamplingParams(logit_bias=bias, dry_multiplier=40.0, dry_allowed_length=2)
    out = short_model.generate("the LORD said", max_tokens=24, sampling=dry)
    assert len({*looping.token_ids}) < len({*out.token_ids})
    texts = [short_model.tokenizer.decode([token]).strip() for token in looping.token_ids]
    free = SamplingParams(logit_bias=bias, dry_multiplier=40.0, dry_sequence_breakers=[text for text in texts if text])
    assert short_model.generate("the LORD said", max_tokens=24, sampling=free).token_ids == looping.token_ids


def test_xtc_spares_line_breaks_and_ends(short_model: Mixtral) -> None:
    """Two tokens are likely; with certainty XTC takes the first, unless it is one that structures the text."""
    prompt = short_model.tokenizer.encode("In the")
    own, end = np.asarray(short_model.logits(prompt))[-1], short_model.tokenizer.eos_token_id
    newline = short_model.tokenizer.encode("\n", bos=False)[-1]
    assert end is not None
    for first, may_come in ((300, False), (newline, True), (end, True), (302, True)):
        bias = {first: 201.0 - float(own[first]), 301: 200.0 - float(own[301])}  # 73% and 27%
        tokens = set()
        for seed in range(12):
            sampling = SamplingParams(1.0, xtc_probability=1.0, xtc_threshold=0.2, logit_bias=bias, seed=seed)
            out = short_model.generate(prompt, max_tokens=1, sampling=sampling, stop_token_ids=[302])
            tokens.add(out.token_ids[0])
        assert tokens == ({first, 301} if may_come else {301})


def test_the_text_of_a_seed_is_the_same_alone_in_a_batch_and_speculated(short_model: Mixtral) -> None:
    sampling = SamplingParams(
        temperature=0.9, top_p=0.95, xtc_probability=0.5, xtc_threshold=0.02, dry_multiplier=1.2, seed=5
    )
    prompts = ["And the LORD said unto Moses, And the LORD said", "In the beginning"]
    alone = [short_model.generate(prompt, max_tokens=14, sampling=sampling).token_ids for prompt in prompts]
    assert alone == [short_model.generate(prompt, max_tokens=14, sampling=sampling).token_ids for prompt in prompts]
    batch = short_model.generate_batch(prompts, max_tokens=14, sampling=sampling)
    assert [out.token_ids for out in batch] == alone
    lookup = PromptLookup(max_ngram=2, adaptive=False)
    again = [
        short_model.generate(prompt, max_tokens=14, sampling=sampling, speculation=lookup).token_ids
        for prompt in prompts
    ]
    assert again == alone


def test_breakers_need_a_tokenizer_and_say_so(small_model: Mixtral) -> None:
    with pytest.raises(TokenizerError, match="dry_sequence_breakers are texts: give none"):
        small_model.generate(PROMPT, max_tokens=1, sampling=SamplingParams(dry_multiplier=1.0))
    sampling = SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=(), xtc_probability=0.5, temperature=1.0)
    assert small_model.generate(PROMPT, max_tokens=2, sampling=sampling).token_ids
