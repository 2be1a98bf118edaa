"""Experts beyond memory give the same bits as experts in memory, whatever the budget."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.errors import CheckpointError, ContextLengthError, MemoryBudgetError
from mlx_mixtral.experts.store import Loading
from mlx_mixtral.layers.expert_bank import ExpertBank
from mlx_mixtral.weights.dtypes import bytes_of
from mlx_mixtral.weights.fill import fill
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert import Recipe, convert
from tests.shared import SharedFolders, random_checkpoint

from .support import bits, budget, streamed

LAYERS, VOCAB = 3, 256
TOKENS = [1, *(int(i) for i in np.random.default_rng(11).integers(3, VOCAB, 25))]
SHARES = (0.0, 0.25, 0.75)
PACKINGS = [
    {"bits": None},
    *({"bits": bits, "group_size": 64} for bits in (1, 2, 3, 4, 5, 6, 8)),
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 128},
    {"bits": None, "mode": "affine", "overrides": {"*.switch_mlp.down_proj": {"bits": 4}}},
    *(
        {"bits": None, "mode": mode, "overrides": {"*.switch_mlp.*": {"mode": mode}}}
        for mode in ("mxfp4", "mxfp8", "nvfp4")
    ),
    {"bits": 4, "overrides": {"*.up_proj": {"bits": 6}, "model.layers.1.*.down_proj": {"bits": 3}}},
]


def _floats(shared: SharedFolders, layers: int) -> Path:
    """Rows wide enough for groups of 128, as little else as can be."""
    changes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": layers, "vocab_size": VOCAB}
    return shared(f"streamed floats {layers}", lambda folder: random_checkpoint(folder, **changes))


@pytest.fixture(scope="module")
def floats(shared: SharedFolders) -> Path:
    return _floats(shared, LAYERS)


@pytest.fixture(scope="module")
def folder(shared: SharedFolders, floats: Path) -> Path:
    return shared("streamed", lambda folder: convert(floats, folder, recipe=Recipe(4)))


@pytest.fixture(scope="module")
def deep(shared: SharedFolders) -> Path:
    """Streamed layers with slots to spare that follow one another: there is something to look ahead to."""
    return shared("streamed deep", lambda folder: convert(_floats(shared, 6), folder, recipe=Recipe(4)))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[Mixtral]:
    with load(folder) as model:
        yield model


@pytest.mark.parametrize("share", SHARES)
def test_prefill_and_decode_are_bit_identical(folder: Path, whole: Mixtral, share: float) -> None:
    tokens = TOKENS
    wanted = whole.generate(tokens, max_tokens=12, sampling=SamplingParams(logprobs=3))
    with streamed(folder, share) as model:
        assert bits(model.logits(tokens)) == bits(whole.logits(tokens))
        got = model.generate(tokens, max_tokens=12, sampling=SamplingParams(logprobs=3))
        assert got.token_ids == wanted.token_ids
        assert got.logprobs == wanted.logprobs
        assert model.residency.misses > 0
        assert model.residency.bytes_read > 0


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_every_packing_is_bit_identical(floats: Path, tmp_path: Path, packing: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    convert(floats, folder, recipe=Recipe(**packing))
    with load(folder) as whole:
        tokens = TOKENS
        wanted, sizes = whole.logits(tokens), [budget(whole, share) for share in (0.0, 0.4)]
        after = whole.generate(tokens, max_tokens=3).token_ids
    for size in sizes:
        with load(folder, memory=size) as model:
            assert model.residency.is_streamed
            assert bits(model.logits(tokens)) == bits(wanted)
            assert model.generate(tokens, max_tokens=3).token_ids == after


@pytest.mark.parametrize("share", SHARES)
def test_batches_are_bit_identical(folder: Path, whole: Mixtral, share: float) -> None:
    generator = np.random.default_rng(3)
    prompt = mx.array(generator.integers(3, VOCAB, (4, 7)), mx.int32)
    with streamed(folder, share) as model:
        for candidate in (prompt, prompt[:, :1], prompt[:1]):
            padding = [0, 2, 5, 6][: candidate.shape[0]] if candidate.shape[1] > 6 else None
            caches = [m.make_cache(left_padding=padding) for m in (whole, model)]
            first = [m.module(candidate, cache) for m, cache in zip((whole, model), caches, strict=True)]
            assert bits(first[0]) == bits(first[1])
            step = mx.argmax(first[0][:, -1:], axis=-1).astype(mx.int32)
            second = [m.module(step, cache) for m, cache in zip((whole, model), caches, strict=True)]
            assert bits(second[0]) == bits(second[1])


def test_results_nobody_waited_for_survive_later_calls(folder: Path, whole: Mixtral) -> None:
    """Slots are only given away when what was computed from them is complete, even if nobody asked for it yet."""
    prompts = [mx.array([[1, *range(start, start + 3)]], mx.int32) for start in range(3, 250, 19)]
    wanted = [bits(whole.module(prompt)) for prompt in prompts]
    with streamed(folder, 0.0) as model:
        lazy = [model.module(prompt) for prompt in prompts]
        assert [bits(logits) for logits in lazy] == wanted


def test_a_slot_is_not_overwritten_before_its_results_are_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wait in ``acquire`` results would be computed from other experts' weights."""
    from mlx_mixtral.experts import pool

    events: list[str] = []
    wait = pool.SlotPool.wait

    def noted(self: pool.SlotPool) -> None:
        wait(self)
        events.append("waited")
        assert not self._pending

    monkeypatch.setattr(pool.SlotPool, "wait", noted)
    with streamed(folder, 0.0) as model:
        start = model.residency.store.start

        def begun(*arguments: object) -> object:
            pools = model.residency._pools()
            assert all(not held._pending for held in pools), "a read began while results were pending"
            events.append("read")
            return start(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(model.residency.store, "start", begun)
        model.generate(TOKENS, max_tokens=6)
    assert events.count("read") > 10


def test_gate_and_up_are_multiplied_while_down_is_read(
    folder: Path, whole: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole.generate([1], max_tokens=12, sampling=SamplingParams(logprobs=3))
    multiplied = threading.Event()
    inner = ExpertBank.inner

    def noted(self: ExpertBank, *arguments: Any, **options: Any) -> mx.array:
        result = inner(self, *arguments, **options)
        mx.eval(result)
        multiplied.set()
        return result

    with streamed(folder, 0.0) as model:
        reader = model.residency.store.reader
        read, waited = reader.read, []

        def slow(info: TensorInfo, *rest: Any) -> None:
            if "down_proj" in info.name:
                waited.append(multiplied.wait(20))
                time.sleep(0.002)
            read(info, *rest)

        monkeypatch.setattr(reader, "read", slow)
        monkeypatch.setattr(ExpertBank, "inner", noted)
        got = model.generate([1], max_tokens=12, sampling=SamplingParams(logprobs=3))
    assert waited
    assert all(waited), "down had to be there before gate and up were multiplied"
    assert (got.token_ids, got.logprobs) == (wanted.token_ids, wanted.logprobs)


def test_only_streamed_layers_read_back_and_once_a_step(folder: Path) -> None:
    with streamed(folder, 0.6) as model:
        missing = [slots < 8 for slots in model.residency.slots]
        out = model.generate(TOKENS, max_tokens=12)
        assert out.stats.decode_experts is not None
        assert out.stats.decode_experts.readbacks == 11 * sum(missing)
        assert 0 < sum(missing) <= len(missing)


def test_a_resident_model_never_reads_back(whole: Mixtral) -> None:
    whole.generate(TOKENS, max_tokens=4)
    assert (whole.residency.readbacks, whole.residency.bytes_read) == (0, 0)
    assert whole.residency.slots == (8,) * LAYERS
    assert whole.residency.budget_bytes is None


def test_each_expert_is_read_once_a_chunk_of_the_prompt(folder: Path) -> None:
    with streamed(folder, 0.0) as model:
        residency = model.residency
        chunk = residency.plan.chunk_tokens
        tokens = (TOKENS * 20)[: min(2 * chunk, 200)]
        before = residency.misses
        model.generate(tokens, max_tokens=1)
        chunks = -(-len(tokens) // chunk)
        # At most every expert of every layer, and the last layer only in the last chunk, for one token's two experts.
        assert residency.misses - before <= chunks * (LAYERS - 1) * 8 + 2
        assert residency.bytes_read == residency.misses * residency.sizes.expert_file_bytes[0]


def test_each_token_uses_exactly_its_two_experts(folder: Path) -> None:
    """Against a naive sum over the experts the router chose, one at a time (arXiv 2401.04088, section 2.1)."""
    with load(folder) as whole, streamed(folder, 0.3) as model:
        x = mx.array(np.random.default_rng(0).standard_normal((1, 9, whole.config.hidden_size)), mx.float32)
        for own, other in zip(whole.module.layers, model.module.layers, strict=True):
            gate_logits = own.moe.gate(x)
            chosen = np.argsort(np.asarray(gate_logits), axis=-1)[..., -2:]
            bank = own.moe.experts.bank
            result = np.zeros(x.shape, np.float32)
            for token in range(9):
                logits = np.asarray(gate_logits)[0, token, chosen[0, token]]
                shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                for expert, share in zip(chosen[0, token], shares, strict=True):
                    row, _ = bank.pairs(x[:, token : token + 1], mx.array([int(expert)]), is_sorted=False)
                    result[0, token] += share * np.asarray(row)[0]
            got = other.moe(x, mx.zeros_like(x))
            assert np.abs(np.asarray(got) - result).max() < 1e-5


@pytest.mark.parametrize("page_cache", [False, True])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_ways_of_reading_and_replacing_change_nothing(
    folder: Path, whole: Mixtral, disk_path: Path, page_cache: bool, policy: str
) -> None:
    tokens = TOKENS
    shutil.copytree(folder, disk_path / "model")
    with streamed(disk_path / "model", 0.25, page_cache=page_cache, policy=policy) as model:
        assert model.generate(tokens, max_tokens=8).token_ids == whole.generate(tokens, max_tokens=8).token_ids


def test_an_mlx_lm_checkpoint_streams_as_it_is(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    network, config = load_model(checkpoint_path(), lazy=True)
    network, config = quantize_model(network, config, 64, 4)
    save_model(tmp_path, network)
    save_config(config, tmp_path / "config.json")
    with load(tmp_path) as whole, load(tmp_path, memory=budget(whole, 0.3)) as model:
        assert model.residency.is_streamed
        tokens = [1, *range(200, 240)]
        assert bits(model.logits(tokens)) == bits(whole.logits(tokens))


def test_an_unquantised_hf_folder_streams_as_it_is() -> None:
    with load(checkpoint_path()) as whole, load(checkpoint_path(), memory=budget(whole, 0.2)) as model:
        assert model.residency.is_streamed
        tokens = TOKENS
        assert bits(model.logits(tokens)) == bits(whole.logits(tokens))


def test_a_budget_below_the_least_names_it_and_its_parts(folder: Path, whole: Mixtral) -> None:
    least = budget(whole, 0.0)
    load(folder, memory=least).close()
    with pytest.raises(
        MemoryBudgetError, match=r"too small: the minimum is .* of weights.* KV cache for .* working memory"
    ):
        load(folder, memory=least - 1)
    with pytest.raises(MemoryBudgetError) as caught:
        load(folder, memory="1MB")
    named = str(caught.value).split("the minimum is ")[1].split(":")[0]
    load(folder, memory=named.replace(" ", "")).close()


@pytest.mark.parametrize("share", SHARES)
def test_peak_memory_stays_within_the_budget(folder: Path, whole: Mixtral, share: float) -> None:
    size = budget(whole, share, context=256)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with load(folder, memory=size, context=256) as model:
        model.generate((TOKENS * 20)[:180], max_tokens=8)
        model.generate((TOKENS * 4)[:60], max_tokens=40)
        assert model.residency.is_streamed
    assert mx.get_peak_memory() - before <= 1.05 * size


def test_memory_can_be_changed_under_a_loaded_model(folder: Path, whole: Mixtral) -> None:
    tokens = TOKENS
    wanted, logits = whole.generate(tokens, max_tokens=12).token_ids, bits(whole.logits(tokens))
    with load(folder) as model:
        everything = model.residency.resident_bytes
        for share in (0.5, 0.0, 0.25, 2.0, 0.75, 0.0, 2.0):
            size = budget(whole, share)
            model.set_memory(size)
            assert model.generate(tokens, max_tokens=12).token_ids == wanted
            assert bits(model.logits(tokens)) == logits
            assert model.residency.is_streamed == (share < 1)
            assert model.nbytes == model.residency.resident_bytes
            assert model.residency.resident_bytes + model.residency.kv_bytes <= size
        assert model.residency.resident_bytes == everything
        assert model.residency.slots == (8,) * LAYERS
        with pytest.raises(MemoryBudgetError):
            model.set_memory("1MB")
        assert model.generate(tokens, max_tokens=12).token_ids == wanted


def test_a_prompt_beyond_the_reserved_context_is_refused_by_name(folder: Path) -> None:
    with load(folder, memory="50MB", context=10) as model:
        limit = model.engine.context_limit
        model.generate([5] * (limit - 1), max_tokens=1)
        if limit < model.config.max_position_embeddings:
            with pytest.raises(ContextLengthError, match=r"the memory budget holds KV cache for \d+.*--context"):
                model.generate([5] * limit, max_tokens=1)


@pytest.mark.parametrize("fault", ["deleted", "truncated", "replaced", "rewritten"])
def test_a_file_that_changes_is_an_error_and_never_wrong_text(tmp_path: Path, folder: Path, fault: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with streamed(copy, 0.0) as model:
        wanted = model.generate(TOKENS, max_tokens=8).token_ids
        for file in copy.glob("*.safetensors"):
            aside = file.with_suffix(".aside")
            if fault == "deleted":
                file.rename(aside)
            elif fault == "replaced":
                file.rename(aside)
                shutil.copyfile(aside, file)
            elif fault == "truncated":
                file.rename(aside)
                file.write_bytes(aside.read_bytes()[:-100])
            else:
                status = file.stat()
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
        with pytest.raises(
            CheckpointError, match=r"safetensors (is no longer there|was replaced|has \d+ bytes|was modified)"
        ):
            model.generate([1, *range(200, 240)], max_tokens=32)
        for file in copy.glob("*.aside"):
            file.rename(file.with_suffix(".safetensors"))
        if fault == "rewritten":
            return
        assert model.generate(TOKENS, max_tokens=8).token_ids == wanted


def test_a_file_written_to_while_it_is_read_is_not_used(
    tmp_path: Path, folder: Path, whole: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what was read of it found in a slot later, when the file is what it was."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    wanted = whole.generate([1], max_tokens=12).token_ids
    untouched = {file: file.stat() for file in copy.glob("*.safetensors")}
    with streamed(copy, 0.0) as model:
        store = model.residency.store
        start, begun = store.start, []

        def garbled(layer: int, expert: int, arrays: dict[str, mx.array], slot: int) -> Loading:
            loading = start(layer, expert, arrays, slot)
            begun.append((layer, expert))
            if len(begun) == 2:
                loading.wait()
                bytes_of(arrays["down.weight"]).reshape(len(arrays["down.weight"]), -1)[slot] = 0
                for file in untouched:
                    os.utime(file, ns=(1, 1))
            return loading

        monkeypatch.setattr(store, "start", garbled)
        with pytest.raises(CheckpointError, match="was modified since"):
            model.generate([1], max_tokens=12)
        monkeypatch.setattr(store, "start", start)
        for file, status in untouched.items():
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert len(begun) == 2
        assert model.generate([1], max_tokens=12).token_ids == wanted


def test_a_failing_read_ends_one_generation_only(folder: Path, whole: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TOKENS
    wanted = whole.generate(tokens, max_tokens=16).token_ids
    with streamed(folder, 0.0) as model:
        reader = model.residency.store.reader
        read, count = reader.read, 0

        def failing(*arguments: object) -> None:
            nonlocal count
            count += 1
            if count % 50 == 0:
                raise CheckpointError("tensor cannot be read: Input/output error")
            read(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(reader, "read", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            model.generate(tokens, max_tokens=64)
        monkeypatch.setattr(reader, "read", read)
        assert model.generate(tokens, max_tokens=16).token_ids == wanted


@pytest.mark.parametrize(("mode", "count"), [("on", 24), ("auto", 80)])
def test_prefetching_changes_nothing_and_reports_itself(deep: Path, mode: str, count: int) -> None:
    """``auto`` takes some tokens to decide."""
    tokens = TOKENS
    with load(deep) as whole:
        wanted = whole.generate(tokens, max_tokens=count).token_ids
    with streamed(deep, 0.85, prefetch=mode) as model:
        assert model.generate(tokens, max_tokens=count).token_ids == wanted
        counters = model.residency.counters
        assert 0 < counters.predicted_right <= counters.predicted
        assert counters.predicted_right <= counters.predicted_needed
        assert model.engine.prefetch.is_decided
        model.set_memory(budget(model, 0.3))
        assert model.generate(tokens, max_tokens=20).token_ids == wanted[:20]


def test_a_trace_has_what_the_routers_chose(whole: Mixtral, folder: Path) -> None:
    texts = [TOKENS, [1, 50, 60, 70]]
    trace = whole.routing_trace(texts)
    assert trace.experts.shape == (len(texts[0]) + 4, LAYERS, 2)
    assert list(trace.starts) == [0, len(texts[0])]
    with streamed(folder, 0.25) as model:
        again = model.routing_trace(texts)
    assert np.array_equal(np.sort(again.experts), np.sort(trace.experts))
    hidden = whole.module.embed_tokens.rows(mx.array([texts[1]]), mx.float32)
    layer = whole.module.layers[0]
    h = hidden + layer.attention(layer.input_norm(hidden), 0, whole.make_cache().chunk(1, hidden.shape[1]))
    logits = np.asarray(layer.moe.gate(layer.post_attention_norm(h)))[0]
    assert np.array_equal(np.sort(trace.experts[-4:, 0]), np.sort(np.argsort(logits, axis=-1)[:, -2:]))


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_file_that_changes_while_a_layer_is_filled_leaves_it_streaming(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with streamed(copy, 0.0) as model:
        wanted = model.generate(TOKENS, max_tokens=8).token_ids
        filled: list[int] = []

        def touch() -> None:
            for file in copy.glob("*.safetensors"):
                status = file.stat()
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))

        def fill_then_touch(reader: Any, ranges: Any) -> None:
            fill(reader, ranges)
            filled.append(len(ranges))
            # With the last one: no layer after it looks at the files again.
            if len(filled) == LAYERS:
                touch()

        if moment == "before":
            touch()
        monkeypatch.setattr("mlx_mixtral.experts.residency.fill", fill_then_touch)
        with pytest.raises(CheckpointError, match="was modified since the model was loaded"):
            model.set_memory("1GB")
        assert len(filled) == (LAYERS if moment == "during" else 0)
        assert model.residency.is_streamed
    with streamed(copy, 0.0) as model:
        assert model.generate(TOKENS, max_tokens=8).token_ids == wanted
