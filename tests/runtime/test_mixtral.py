"""The object apps use: text in and out, cancelling, threads, limits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import LoadProgress, Mixtral, SamplingParams, load
from mlx_mixtral.errors import (
    ChatTemplateError,
    ClosedError,
    ContextLengthError,
    DtypeRangeError,
    InvalidRequestError,
    MemoryBudgetError,
    TokenizerError,
)

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def bare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint without its tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, folder)
    return folder


def test_chunks_concatenate_to_the_decoded_tokens(short_model: Mixtral) -> None:
    """Of a model that writes halves of characters and any piece of the vocabulary."""
    model = short_model
    for prompt in ("In the beginning", "Au commencement", "def main(", "12 + 30 ="):
        chunks = list(model.stream(prompt, max_tokens=40, sampling=SAMPLED))
        ids = [chunk.token_id for chunk in chunks]
        decoder = model.tokenizer.streaming_decoder(continues=True)
        assert "".join(c.text for c in chunks) == "".join(map(decoder.add, ids)) + decoder.finish()
        assert "".join(c.text for c in chunks) == model.tokenizer.decode(ids, continues=True)
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"


def test_generate_is_the_stream_collected(model: Mixtral) -> None:
    out = model.generate("And God said", max_tokens=20, sampling=SAMPLED)
    chunks = list(model.stream("And God said", max_tokens=20, sampling=SAMPLED))
    assert out.text == "".join(c.text for c in chunks)
    assert list(out.token_ids) == [c.token_id for c in chunks]
    assert out.finish_reason == "length"
    assert out.stats.tokens == 20
    assert out.stats.prompt_tokens == len(model.tokenizer.encode("And God said"))
    assert out.stats.peak_memory_bytes >= model.nbytes


def test_text_and_its_token_ids_are_the_same_prompt(model: Mixtral) -> None:
    ids = model.tokenizer.encode("And God said")
    assert ids[0] == 1
    assert model.generate("And God said", max_tokens=8).token_ids == model.generate(ids, max_tokens=8).token_ids
    assert model.generate(np.array(ids), max_tokens=8).token_ids == model.generate(ids, max_tokens=8).token_ids


def test_same_seed_same_text(model: Mixtral) -> None:
    texts = [model.generate("And God said", max_tokens=30, sampling=SAMPLED).text for _ in range(2)]
    assert texts[0] == texts[1]


def test_stop_string_ends_the_text_before_it_however_tokens_cut_it(model: Mixtral) -> None:
    whole = model.generate("And God said", max_tokens=40, sampling=SAMPLED).text
    for stop in (whole[9:12], whole[17:25], whole[5]):
        out = model.generate("And God said", max_tokens=40, sampling=SAMPLED, stop=["@@never@@", stop])
        assert out.text == whole[: whole.find(stop)]
        assert out.finish_reason == "stop"
        assert len(out.token_ids) <= 40


def test_stop_token_ends_the_generation_and_is_no_part_of_the_text(model: Mixtral) -> None:
    free = model.generate("And God said", max_tokens=12)
    at = 5
    out = model.generate("And God said", max_tokens=12, stop_token_ids=[free.token_ids[at]])
    first = free.token_ids.index(free.token_ids[at])
    assert out.token_ids == free.token_ids[: first + 1]
    assert out.finish_reason == "stop"
    assert out.text == model.generate("And God said", max_tokens=first).text if first else out.text == ""


def test_end_of_sequence_of_the_checkpoint_stops(model: Mixtral) -> None:
    out = model.generate("And God said", sampling=SamplingParams(logit_bias={2: 1000.0}))
    assert (out.token_ids, out.text, out.finish_reason) == ((2,), "", "stop")


def test_logprobs_come_when_asked_for(model: Mixtral) -> None:
    chunks = list(model.stream("And God said", max_tokens=3, sampling=SamplingParams(logprobs=2)))
    ids = model.tokenizer.encode("And God said")
    logits = np.asarray(model.logits(ids + [c.token_id for c in chunks]))[len(ids) - 1 :].astype(np.float64)
    for chunk, row in zip(chunks, logits, strict=False):
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert chunk.logprob == pytest.approx(logprobs[chunk.token_id], abs=1e-4)
        assert [token for token, _ in chunk.top_logprobs] == list(np.argsort(-row)[:2])
    assert model.generate("And God said", max_tokens=2).logprobs is None
    assert len(model.generate("And God said", max_tokens=2, sampling=SamplingParams(logprobs=0)).logprobs or ()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 4096]}, r"4096.*0 to 4095"),
        ({"prompt": [1, -1]}, r"-1.*0 to 4095"),
        ({"prompt": [1, 2.5]}, "2.5"),
        ({"prompt": "x", "max_tokens": 0}, r"max_tokens is 0.*at least 1"),
        ({"prompt": "x", "stop": ""}, "stop string"),
        ({"prompt": "x", "stop_token_ids": [9999]}, r"stop_token_ids.*9999"),
    ],
)
def test_bad_requests_are_refused_before_any_work(model: Mixtral, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        model.stream(**arguments)
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_context_is_named_when_the_prompt_does_not_fit(small_model: Mixtral) -> None:
    with pytest.raises(ContextLengthError, match=r"1024 tokens.*1024"):
        small_model.generate([1] * 1024)
    with pytest.raises(ContextLengthError, match="1025"):
        small_model.logits([1] * 1025)
    out = small_model.generate([1] * 1020, max_tokens=50)
    assert (len(out.token_ids), out.finish_reason) == (4, "length")


def test_logits_of_a_long_text_are_those_of_one_forward(model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, *(int(i) for i in np.random.default_rng(3).integers(3, 4096, 60))]
    whole = np.asarray(model.module(mx.array([ids])))[0]
    monkeypatch.setattr(model.residency, "plan", replace(model.residency.plan, chunk_tokens=16))
    logits = model.logits(ids)
    assert logits.shape == (61, 4096)
    np.testing.assert_allclose(np.asarray(logits), whole, atol=2e-4)
    with pytest.raises(InvalidRequestError, match="empty"):
        model.logits([])


def test_without_a_tokenizer_token_ids_work_and_text_says_why_not(bare: Path, model: Mixtral) -> None:
    with load(bare) as headless:
        ids = model.tokenizer.encode("And God said")
        out = headless.generate(ids, max_tokens=5)
        assert out.token_ids == model.generate(ids, max_tokens=5).token_ids
        assert out.text == ""
        assert headless.logits(ids).shape == (len(ids), 4096)
        for call in (
            lambda: headless.generate("And God said"),
            lambda: headless.chat([{"role": "user", "content": "Hi"}]),
            lambda: headless.tokenizer,
            lambda: headless.generate(ids, stop="x"),
        ):
            with pytest.raises(TokenizerError, match="tokenizer"):
                call()


def test_chat_applies_the_format_and_samples(model: Mixtral) -> None:
    messages = [{"role": "user", "content": "And God said"}]
    prompt = model.tokenizer.encode_chat(messages)
    chat = SamplingParams(temperature=0.7, top_p=0.95, seed=3)
    ours = model.chat(messages, sampling=chat, max_tokens=10)
    assert ours.token_ids == model.generate(prompt, sampling=chat, max_tokens=10).token_ids
    assert ours.stats.prompt_tokens == len(prompt)
    streamed = model.stream_chat(messages, sampling=chat, max_tokens=10)
    assert "".join(chunk.text for chunk in streamed) == ours.text == model.tokenizer.decode(ours.token_ids)
    assert not ours.text.startswith(" ")


def test_a_template_that_writes_nothing_is_an_error(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text("{{ '' }}")
    with load(folder) as model, pytest.raises(ChatTemplateError, match="returns nothing for these messages"):
        model.chat([{"role": "user", "content": "Hi"}])


def test_closed_model_says_so(tiny: Path) -> None:
    model = load(tiny)
    model.close()
    for call in (lambda: model.generate("x"), lambda: model.logits([1]), lambda: model.module, model.make_cache):
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_progress_reaches_the_bytes_of_the_checkpoint(tiny: Path) -> None:
    seen: list[LoadProgress] = []
    load(tiny, progress=seen.append).close()
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[-1].total_bytes == 2 * 8_429_184
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def test_memory_budget_holds_everything_or_names_the_least(tiny: Path) -> None:
    weights = 4 * 8_429_184
    with load(tiny, memory="100MB", context=512) as model:
        assert model.nbytes == weights == model.residency.resident_bytes
        # Half of a step more, of one of six layers: the cache while it grows.
        assert model.residency.kv_bytes == 512 * 2 * 6 * 2 * 32 * 4 * 7 // 6
        assert model.residency.budget_bytes == 100_000_000
    with pytest.raises(MemoryBudgetError, match=r"of weights.*512 tokens.*smaller context"):
        load(tiny, memory="5MB", context=512)
    with pytest.raises(InvalidRequestError, match="not a size"):
        load(tiny, memory="lots")
    for context in (0, 2000, "many"):
        with pytest.raises(InvalidRequestError, match="context"):
            load(tiny, context=context)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.15), ("bfloat16", 1.5)])
def test_compute_type_can_be_chosen(dtype: str, atol: float, mlx_lm_folder: Any, recorded: dict[str, Any]) -> None:
    folder = mlx_lm_folder(q_bits=8, q_group_size=64)
    ids = recorded["ids"][0, :5].tolist()  # 16 bits are slow on MLX's CPU backend
    with load(folder) as reference, load(folder, dtype=dtype) as model:
        logits = model.logits(ids)
        assert str(logits.dtype) == f"mlx.core.{dtype}"
        assert np.abs(np.asarray(logits.astype(mx.float32)) - np.asarray(reference.logits(ids))).max() < atol
        assert model.nbytes < reference.nbytes


def test_unknown_compute_type_is_an_error(tiny: Path) -> None:
    with pytest.raises(InvalidRequestError, match="float64"):
        load(tiny, dtype="float64")


def test_unquantised_experts_in_16_bits_are_refused_on_the_cpu_backend(tiny: Path) -> None:
    """MLX's CPU gather_mm computes float32 only; without this the first forward would fail."""
    with pytest.raises(InvalidRequestError, match=r"float16.*CPU.*float32"):
        load(tiny, dtype="float16")


def test_weights_beyond_float16_fall_back_or_say_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dict(mx.load(str(tiny / "model.safetensors")))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 70000.0
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    monkeypatch.setattr("mlx_mixtral.runtime.filling.refuse_cpu_gather", lambda *_: None)
    with pytest.raises(DtypeRangeError, match=r"model.norm.weight.*65504.*bfloat16"):
        load(tmp_path, dtype="float16")
    monkeypatch.setattr("mlx_mixtral.runtime.load.compute_dtype", lambda *_: "F16")
    with load(tmp_path) as model:
        assert model.module.dtype == mx.bfloat16


def test_configuration_without_weights_or_neither_is_an_error(tiny: Path, tmp_path: Path) -> None:
    from mlx_mixtral.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"neither config\.json nor params\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe"}))
    with pytest.raises(Exception, match="qwen2_moe"):
        load(tmp_path)
