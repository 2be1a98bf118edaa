"""``speculation=`` of the public calls: the same text, whose turn it is, and drafts that cannot draft."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from mlx_mixtral import DraftModel, Mixtral, PromptLookup, SamplingParams, load
from mlx_mixtral.errors import BusyError, ClosedError, InvalidRequestError
from tests.experts.support import converted, streamed

PROMPT = (
    "And the LORD said unto Moses, Speak unto the children of Israel, and say unto them: Speak unto the children of"
)
WHOLE = PromptLookup(adaptive=False)
TALK = [{"role": "user", "content": "Say it again. Say it again. Say it again."}]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("packed") / "model", bits=4, group_size=32)


@pytest.fixture(scope="module")
def draft(packed: Path) -> Iterator[Mixtral]:
    with load(packed) as loaded:
        yield loaded


def drafted(draft: Mixtral) -> DraftModel:
    return DraftModel(draft, max_tokens=4, adaptive=False)


def test_text_is_the_same_and_takes_fewer_forwards(model: Mixtral, draft: Mixtral) -> None:
    wanted = model.generate(PROMPT, max_tokens=30)
    assert wanted.stats.speculation is None
    for speculation in (WHOLE, PromptLookup(), drafted(draft)):
        out = model.generate(PROMPT, max_tokens=30, speculation=speculation)
        assert (out.text, out.token_ids, out.finish_reason) == (wanted.text, wanted.token_ids, "length")
        done = out.stats.speculation
        assert done is not None
        assert done.tokens == 29
        if speculation.adaptive:
            continue
        assert done.tokens_per_forward > 1.5
        shown = out.stats.to_dict()
        assert shown["tokens_per_forward"] == 29 / done.forwards
        assert shown["acceptance"] == done.accepted / done.proposed


def test_sampled_text_is_that_of_the_seed_with_lookup(model: Mixtral) -> None:
    sampling = SamplingParams(temperature=0.6, top_p=0.9, presence_penalty=0.1, seed=11, logprobs=1)
    wanted = model.generate(PROMPT, max_tokens=30, sampling=sampling)
    out = model.generate(PROMPT, max_tokens=30, sampling=sampling, speculation=WHOLE)
    assert out.token_ids == wanted.token_ids
    assert out.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert out.stats.speculation is not None
    assert out.stats.speculation.accepted > 0


def test_sampled_text_comes_again_with_a_draft(model: Mixtral, draft: Mixtral) -> None:
    sampling = SamplingParams(temperature=0.9, seed=5)
    texts = {
        model.generate(PROMPT, max_tokens=16, sampling=sampling, speculation=DraftModel(draft, max_tokens=3)).token_ids
        for _ in range(2)
    }
    assert len(texts) == 1


def test_chat_speculates(model: Mixtral) -> None:
    sampling = SamplingParams()
    wanted = model.chat(TALK, max_tokens=20, sampling=sampling)
    assert model.chat(TALK, max_tokens=20, sampling=sampling, speculation=WHOLE).text == wanted.text
    chunks = list(model.stream_chat(TALK, max_tokens=20, sampling=sampling, speculation=WHOLE))
    assert "".join(chunk.text for chunk in chunks) == wanted.text
    assert chunks[-1].finish_reason == wanted.finish_reason


def test_stop_strings_and_tokens_end_it_in_the_middle_of_a_round(model: Mixtral) -> None:
    whole = model.generate(PROMPT, max_tokens=30)
    for stop in ({"stop": whole.text[25:31]}, {"stop_token_ids": [whole.token_ids[9]]}):
        options: dict[str, Any] = {"max_tokens": 30, **stop}
        wanted = model.generate(PROMPT, **options)
        out = model.generate(PROMPT, **options, speculation=WHOLE)
        assert (out.text, out.token_ids, out.finish_reason) == (wanted.text, wanted.token_ids, "stop")


def test_what_is_kept_for_the_next_prompt_is_what_was_said(tiny: Path, model: Mixtral) -> None:
    """Texts that go on from a speculated turn, closed in the middle of a round, are those without anything kept."""
    for take in (3, 7, 8, 20):
        fresh = [*model.tokenizer.encode(PROMPT)[:-1], 50 + take]
        with model.stream(fresh, max_tokens=20, speculation=WHOLE) as stream:
            got = [chunk.token_id for chunk in itertools.islice(stream, take)]
        longer = [*fresh, *got, 301]
        out = model.generate(longer, max_tokens=8)
        assert out.stats.reused_tokens >= len(fresh) + take - 1
        with load(tiny) as fresh_model:
            assert fresh_model.generate(longer, max_tokens=8).token_ids == out.token_ids


def test_a_streamed_model_speculates(tiny: Path, model: Mixtral, draft: Mixtral) -> None:
    wanted = model.generate(PROMPT, max_tokens=16)
    with streamed(tiny, 0.4) as small:
        for speculation in (WHOLE, PromptLookup(), drafted(draft)):
            assert small.generate(PROMPT, max_tokens=16, speculation=speculation).token_ids == wanted.token_ids


def test_cancelled_or_closed_both_models_are_free_again(model: Mixtral, draft: Mixtral) -> None:
    asked = itertools.count()
    out = model.generate(PROMPT, max_tokens=30, speculation=drafted(draft), cancelled=lambda: next(asked) == 6)
    assert (len(out.token_ids), out.finish_reason) == (7, "cancelled")
    stream = model.stream(PROMPT, max_tokens=30, speculation=drafted(draft))
    for _ in range(4):
        next(stream)
    with pytest.raises(BusyError, match="this model is already"):
        draft.generate(PROMPT, max_tokens=1)
    stream.close()
    assert draft.generate(PROMPT, max_tokens=1).token_ids
    with draft.stream(PROMPT, max_tokens=4) as other:
        next(other)
        with pytest.raises(BusyError, match="the draft model is already generating"):
            model.generate(PROMPT, max_tokens=4, speculation=drafted(draft))
    assert model.generate(PROMPT, max_tokens=1).token_ids


def test_a_draft_is_loaded_from_its_folder(model: Mixtral, packed: Path) -> None:
    speculation = DraftModel(str(packed), max_tokens=2)
    assert isinstance(speculation.model, Mixtral)
    with speculation.model:
        assert model.generate(PROMPT, max_tokens=4, speculation=speculation).token_ids
    with pytest.raises(ClosedError, match="the draft model was closed"):
        model.generate(PROMPT, max_tokens=4, speculation=speculation)


def test_a_prompt_longer_than_the_drafts_context_is_generated_without_it(
    tiny: Path, model: Mixtral, tmp_path: Path
) -> None:
    short = shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 32}
    (short / "config.json").write_text(json.dumps(config))
    wanted = model.generate(PROMPT * 2, max_tokens=6)
    with load(short) as draft:
        out = model.generate(PROMPT * 2, max_tokens=6, speculation=drafted(draft))
    assert out.token_ids == wanted.token_ids
    assert out.stats.speculation is not None
    assert out.stats.speculation.proposed == 0


def test_a_draft_with_other_pieces_is_refused_by_the_first_that_differs(
    tiny: Path, model: Mixtral, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((other / "tokenizer.model").read_bytes())
    first, second = pieces.pieces[700].piece, pieces.pieces[900].piece
    pieces.pieces[700].piece, pieces.pieces[900].piece = second, first
    (other / "tokenizer.model").write_bytes(pieces.SerializeToString())
    with load(other) as draft:
        with pytest.raises(InvalidRequestError) as refused:
            model.generate(PROMPT, max_tokens=4, speculation=drafted(draft))
        assert str(refused.value).startswith(f"token 700 is {second!r} in the draft model and {first!r} in the model")
    assert model.generate(PROMPT, max_tokens=1).token_ids


def test_a_draft_with_another_number_of_tokens_is_refused(model: Mixtral) -> None:
    with load(Path(__file__).parents[1] / "goldens" / "transformers" / "llama") as draft:
        size = draft.config.vocab_size
        with pytest.raises(InvalidRequestError, match=f"vocabulary of {size} tokens, but the model's has 4096"):
            model.generate(PROMPT, max_tokens=4, speculation=drafted(draft))


def test_token_ids_are_enough_for_a_draft_without_a_tokenizer(tiny: Path, model: Mixtral, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare / name)
    with load(bare) as draft:
        out = model.generate(PROMPT, max_tokens=6, speculation=drafted(draft))
    assert out.token_ids == model.generate(PROMPT, max_tokens=6).token_ids


def test_a_model_does_not_draft_for_itself(model: Mixtral) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be its own draft"):
        model.stream(PROMPT, speculation=DraftModel(model))


def test_batches_do_not_speculate(model: Mixtral) -> None:
    with pytest.raises(InvalidRequestError, match="speculation is for one text at a time"):
        model.generate_batch([PROMPT], speculation=PromptLookup())
    assert model.generate_batch([PROMPT], max_tokens=1, speculation=None)[0].token_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: PromptLookup(max_ngram=0), "max_ngram is 0; it must be an integer from 1 to 16"),
        (lambda _: PromptLookup(max_ngram=17), "max_ngram is 17"),
        (lambda _: PromptLookup(max_ngram=True), "max_ngram is True"),
        (lambda _: PromptLookup(max_tokens=32), "max_tokens is 32; it must be an integer from 1 to 31"),
        (lambda _: PromptLookup(max_tokens=2.0), "max_tokens is 2.0"),
        (lambda _: PromptLookup(adaptive="yes"), "adaptive is 'yes'"),
        (lambda model: DraftModel(model, max_tokens=0), "max_tokens is 0"),
        (lambda model: DraftModel(model, adaptive=None), "adaptive is None"),
        (lambda _: DraftModel(None), "model is None"),
        (lambda model: model.stream("Hi", speculation="lookup"), "speculation is 'lookup'"),
        (lambda model: model.stream("Hi", speculation=model), "it must be PromptLookup or DraftModel"),
    ],
)
def test_bad_arguments_are_named(model: Mixtral, make: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        make(model)
    assert message in str(error.value)
