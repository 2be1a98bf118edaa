"""Adapters of a loaded model: what they compute, for whom, and that nothing of one reaches another."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_mixtral import AdapterSource, Mixtral, PromptLookup, SamplingParams, load
from mlx_mixtral.errors import (
    BusyError,
    CheckpointError,
    ClosedError,
    InvalidRequestError,
    MemoryBudgetError,
    PromptCacheError,
)
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral_convert import Recipe, convert
from tests.adapters.made import lora
from tests.conftest import Loader
from tests.kernels import kernels
from tests.shared import SharedFolders, random_checkpoint

PROMPT = [1, *range(300, 340)]
OTHERS = [1, *range(500, 560)]


@pytest.fixture(scope="module")
def folder(shared: SharedFolders, short: Path) -> Path:
    return shared("4 bits for adapters", lambda place: convert(short, place, recipe=Recipe(bits=4)))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Two that change everything, with other ranks, and one of attention alone."""
    place = tmp_path_factory.mktemp("adapters")
    lora(place / "one", folder, seed=1, rank=8)
    lora(place / "two", folder, seed=2, rank=3)
    lora(place / "small", folder, seed=3, parts=("attention",))
    return place


@pytest.fixture
def model(folder: Path, adapters: Path) -> Iterator[Mixtral]:
    with load(folder, adapter=[adapters / "one", adapters / "two", adapters / "small"]) as made:
        yield made


def logits(model: Mixtral, tokens: list[int] = PROMPT) -> Any:
    return np.array(model.logits(tokens))


def stored(folder: Path, *adapters: Path, **options: Any) -> Mixtral:
    """With as few experts in memory as can be, and all of ``adapters``."""
    with load(folder, **options) as whole:
        least = whole.min_memory_bytes
    extra = sum((path / "adapters.safetensors").stat().st_size for path in adapters)
    return load(folder, memory=least + extra + 500_000, adapter=list(adapters), **options)


def test_logits_are_those_of_mlx_lm(folder: Path, model: Mixtral, tmp_path: Path) -> None:
    own = lora(tmp_path / "own", folder, parts=("attention", "router", "expert"))
    reference, *_ = mlx_lm.load(str(folder), adapter_path=str(own))
    reference.set_dtype(mx.float32)
    expected = np.array(reference(mx.array([PROMPT]))[0])
    model.adapters.add(own)
    model.adapters.use("own")
    np.testing.assert_allclose(logits(model), expected, atol=5e-5)
    one_token_each = model.generate(PROMPT, max_tokens=6).token_ids
    assert one_token_each[0] == int(expected[-1].argmax())


def test_a_model_without_an_adapter_keeps_its_bits(folder: Path, adapters: Path, model: Mixtral) -> None:
    with load(folder) as plain:
        expected, text = logits(plain), plain.generate(PROMPT, max_tokens=16).token_ids
    assert np.array_equal(logits(model), expected)
    model.adapters.use("one")
    changed = logits(model)
    assert not np.allclose(changed, expected, atol=0.1)
    model.adapters.use(None)
    assert np.array_equal(logits(model), expected)
    assert model.generate(PROMPT, max_tokens=16).token_ids == text
    model.adapters.use("one")
    assert model.generate(PROMPT, max_tokens=16, adapter=None).token_ids == text
    model.adapters.remove("one")
    assert model.adapters.in_use is None
    assert np.array_equal(logits(model), expected)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_streamed_experts_give_the_bits_of_resident_ones(
    folder: Path, adapters: Path, model: Mixtral, policy: str
) -> None:
    """Changes go by expert: slots, overflow banks and turns are none of their business."""
    with stored(folder, adapters / "one", policy=policy) as streamed:
        assert streamed.residency.is_streamed
        for each in (model, streamed):
            each.adapters.use("one")
        assert np.array_equal(logits(streamed), logits(model))
        tokens = [streamed.generate(prompt, max_tokens=24).token_ids for prompt in (PROMPT, OTHERS)]
        assert tokens == [model.generate(prompt, max_tokens=24).token_ids for prompt in (PROMPT, OTHERS)]
        assert streamed.residency.misses > 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_of_a_batch_have_adapters_of_their_own(
    folder: Path, adapters: Path, model: Mixtral, is_streamed: bool
) -> None:
    """Three adapters and none, with prompts of other lengths that join and leave: as each alone."""
    names = ["one", "two", None, "small", "two", None, "one"]
    prompts = [PROMPT, PROMPT, PROMPT, OTHERS, OTHERS, PROMPT[:9], PROMPT[:12]]
    lengths = [20, 9, 14, 20, 6, 20, 11]
    each = [{"adapter": name, "max_tokens": count} for name, count in zip(names, lengths, strict=True)]
    alone = [model.generate(prompt, **own).token_ids for prompt, own in zip(prompts, each, strict=True)]  # type: ignore[arg-type]
    assert len(set(alone)) == len(alone)
    paths = [adapters / name for name in ("one", "two", "small")]
    with stored(folder, *paths) if is_streamed else load(folder, adapter=paths) as batched:
        assert batched.residency.is_streamed == is_streamed
        for rows in (7, 4):
            found = batched.generate_batch(prompts, each=each, max_rows=rows)  # type: ignore[arg-type]
            assert [generation.token_ids for generation in found] == alone


def test_sampled_rows_and_samples_of_one_prompt(model: Mixtral) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    found = model.generate_batch([PROMPT], n=3, adapter="two", sampling=sampling, max_tokens=8)
    alone = [
        model.generate(PROMPT, adapter="two", max_tokens=8, sampling=SamplingParams(temperature=1.0, seed=5 + index))
        for index in range(3)
    ]
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]


def test_speculation_and_several_tokens_at_once(model: Mixtral) -> None:
    prompt = PROMPT[:12] * 3
    plain = model.generate(prompt, adapter="one", max_tokens=24).token_ids
    assert model.generate(prompt, adapter="one", max_tokens=24, speculation=PromptLookup()).token_ids == plain


def test_no_prompt_goes_on_from_another_adapters(model: Mixtral) -> None:
    def reused(adapter: str | None) -> int:
        return model.generate(PROMPT, adapter=adapter, max_tokens=2).stats.reused_tokens

    assert reused("one") == 0
    assert reused("two") == 0
    assert reused(None) == 0
    assert reused("one") > 0
    assert reused(None) > 0
    cached = model.generate_batch([PROMPT] * 3, each=[{"adapter": "small"}, {"adapter": "two"}, {"adapter": "small"}])
    assert [each.stats.reused_tokens > 0 for each in cached][:2] == [False, True]


def test_what_rows_leave_is_their_adapters(model: Mixtral) -> None:
    """Prompts and answers of a batch are kept when its rows leave."""
    found = model.generate_batch([PROMPT, OTHERS], each=[{"adapter": "one"}, {"adapter": "two"}], max_tokens=24)
    for prompt, name, answer in zip((PROMPT, OTHERS), ("one", "two"), found, strict=True):
        longer = [*prompt, *answer.token_ids, 7]
        for adapter, kept in ((None, False), ("small", False), (name, True)):
            again = model.generate(longer, adapter=adapter, max_tokens=2)
            assert (again.stats.reused_tokens > len(prompt)) == kept


def test_a_prompt_of_an_adapter_that_was_removed_is_forgotten(model: Mixtral, adapters: Path) -> None:
    model.generate(PROMPT, adapter="one", max_tokens=2)
    model.generate(OTHERS, adapter="two", max_tokens=2)
    model.adapters.remove("one")
    assert model.generate(OTHERS, adapter="two", max_tokens=2).stats.reused_tokens > 0
    assert len(model.engine.prompt_cache.kept) == 1
    model.adapters.add(AdapterSource(adapters / "one", scale=0.5))
    assert model.generate(PROMPT, adapter="one", max_tokens=2).stats.reused_tokens == 0


def test_a_saved_prompt_knows_its_adapter(folder: Path, adapters: Path, model: Mixtral, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    expected = model.generate(PROMPT, adapter="one", max_tokens=8).token_ids
    model.adapters.use("one")
    model.save_prompt(file, PROMPT[:-1])
    with load(folder) as other:
        with pytest.raises(PromptCacheError, match=r"made with the adapter one at scale 1\.0, which is not loaded"):
            other.load_prompt(file)
        other.adapters.add(adapters / "one", name="renamed")
        assert other.load_prompt(file) == PROMPT[:-1]
        found = other.generate(PROMPT, adapter="renamed", max_tokens=8)
        assert (found.token_ids, found.stats.reused_tokens) == (expected, len(PROMPT) - 2)
        assert other.generate(PROMPT, max_tokens=8).stats.reused_tokens == 0
        other.adapters.remove("renamed")
        other.adapters.add(AdapterSource(adapters / "one", scale=2.0))
        with pytest.raises(PromptCacheError, match="not loaded"):
            other.load_prompt(file)


def test_a_scale_multiplies_what_an_adapter_changes(folder: Path, adapters: Path) -> None:
    """Of a change of the output head alone the logits are linear in it."""
    head = lora(adapters / "head", folder, seed=9, parts=("head",))
    with load(folder) as model:
        base = logits(model)
        for scale, name in ((1.0, "whole"), (-0.5, "less"), (0.0, "none")):
            model.adapters.add(head, name=name, scale=scale)
            model.adapters.use(name)
            found = logits(model) - base
            if scale == 1.0:
                whole = found
            np.testing.assert_allclose(found, scale * whole, atol=2e-5)
    shutil.rmtree(head)


def test_memory_is_what_was_planned(folder: Path, adapters: Path) -> None:
    def held(model: Mixtral) -> int:
        module, nbytes = model.module, 0
        for layer in module.layers:
            linears = [*layer.attention.qkv, layer.attention.o_proj, layer.moe.gate]
            nbytes += sum(array.nbytes for each in linears for own in each.adapted.values() for array in own.arrays)
            experts = layer.moe.experts.adapted.values()
            nbytes += sum(array.nbytes for changes in experts for array in changes.arrays)
        return nbytes + sum(array.nbytes for own in module.lm_head.adapted.values() for array in own.arrays)

    with load(folder) as model:
        before = model.min_memory_bytes
        model.adapters.add(adapters / "one")
        assert held(model) == model.adapters.nbytes == model.adapters["one"].nbytes
        assert model.min_memory_bytes == before + model.adapters.nbytes
        model.adapters.add(adapters / "two")
        assert held(model) == model.adapters.nbytes == model.engine.planner.adapter_bytes
        model.adapters.remove("one")
        assert held(model) == model.adapters.nbytes == model.min_memory_bytes - before


def test_adapters_are_part_of_a_budget(folder: Path, adapters: Path) -> None:
    with load(folder) as model:
        least = model.min_memory_bytes
        model.adapters.add(adapters / "one")
        nbytes = model.adapters.nbytes
    with pytest.raises(MemoryBudgetError, match=r"is too small.* of adapters"):
        load(folder, memory=least + nbytes // 2, adapter=adapters / "one")
    with load(folder, memory=least + nbytes // 2) as model:
        expected, slots = logits(model), model.residency.slots
        with pytest.raises(MemoryBudgetError, match="of adapters"):
            model.adapters.add(adapters / "one")
        assert (len(model.adapters), model.residency.slots) == (0, slots)
        assert np.array_equal(logits(model), expected)
    with load(folder, memory=least + nbytes + nbytes // 4) as model:
        before = sum(model.residency.slots)
        model.adapters.add(adapters / "one")
        assert sum(model.residency.slots) < before
        model.adapters.remove("one")
        assert sum(model.residency.slots) == before


def test_one_adapter_is_in_use_from_the_start(folder: Path, adapters: Path, model: Mixtral) -> None:
    with load(folder, adapter=AdapterSource(adapters / "two", "mine")) as other:
        assert (other.adapters.in_use, list(other.adapters)) == ("mine", ["mine"])
        assert "mine (in use)" in repr(other.adapters)
        found = other.generate(PROMPT, max_tokens=8).token_ids
    assert (model.adapters.in_use, list(model.adapters)) == (None, ["one", "two", "small"])
    assert model.generate(PROMPT, max_tokens=8, adapter="two").token_ids == found


def test_what_cannot_be_asked_for(folder: Path, adapters: Path, model: Mixtral, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no adapter 'three'; there are: one, two, small"):
        model.generate(PROMPT, adapter="three")
    with pytest.raises(InvalidRequestError, match="adapter is 7"):
        model.generate(PROMPT, adapter=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="'one' is loaded already"):
        model.adapters.add(adapters / "one")
    with pytest.raises(InvalidRequestError, match="no adapter 'none'"):
        model.adapters.use("none")
    with pytest.raises(CheckpointError, match="holds a model, not an adapter"):
        model.adapters.add(folder)
    with pytest.raises(InvalidRequestError, match="two adapters have the name 'one'"):
        load(folder, adapter=[adapters / "one", str(adapters / "one")])
    with pytest.raises(InvalidRequestError, match="adapter is 3"):
        load(folder, adapter=3)  # type: ignore[arg-type]
    random_checkpoint(tmp_path / "other")
    lora(tmp_path / "small", tmp_path / "other")
    with pytest.raises(CheckpointError):
        model.adapters.add(tmp_path / "small", name="other")
    assert len(model.adapters) == 3


def test_a_damaged_adapter_leaves_nothing(folder: Path, adapters: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(adapters / "one", bad)
    held = mx.load(str(bad / "adapters.safetensors"))
    assert isinstance(held, dict)
    last = max(name for name in held if "layers.1" in name and "down_proj.lora_b" in name)
    held[last] = held[last] * mx.nan
    mx.save_safetensors(str(bad / "adapters.safetensors"), held)
    with load(folder) as model:
        expected = logits(model)
        with pytest.raises(CheckpointError, match="NaN"):
            model.adapters.add(bad)
        assert len(model.adapters) == 0
        assert model.engine.planner.adapter_bytes == 0
        assert not any(layer.attention.qkv[0].adapted for layer in model.module.layers)
        assert np.array_equal(logits(model), expected)
    with pytest.raises(CheckpointError, match="NaN"):
        load(folder, adapter=bad)


def test_nothing_changes_under_a_generation(model: Mixtral, adapters: Path) -> None:
    stream = model.stream(PROMPT, adapter="one", max_tokens=8)
    next(stream)
    for change in (lambda: model.adapters.remove("one"), lambda: model.adapters.use("two")):
        with pytest.raises(BusyError):
            change()
    stream.close()
    late = model.stream(PROMPT, adapter="one", max_tokens=8)
    model.adapters.remove("one")
    with pytest.raises(InvalidRequestError, match="was removed before it began"):
        next(late)
    assert model.generate(PROMPT, max_tokens=2, adapter="two").token_ids


def test_a_dropped_model_goes_at_once(folder: Path, adapters: Path) -> None:
    gc.disable()
    try:
        model = load(folder, adapter=adapters / "one")
        gone, kept = weakref.ref(model.engine), model.adapters
        model.close()
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ClosedError):
        kept.add(adapters / "two")


@pytest.mark.parametrize(("parts", "most"), [(("attention",), 4), (("expert",), 6), (("attention", "expert"), 10)])
def test_two_kernels_a_matrix_in_a_step(
    shared: SharedFolders, tmp_path: Path, as_on_gpus: Loader, parts: tuple[str, ...], most: int
) -> None:
    """Of a layer: q, k and v are one matrix here; gate and up are two, since adapters keep them apart."""
    narrow = shared("three narrow layers", lambda place: random_checkpoint(place, num_hidden_layers=3))
    convert(narrow, tmp_path / "4bit", recipe=Recipe(bits=4))
    lora(tmp_path / "lora", tmp_path / "4bit", parts=parts)
    with as_on_gpus(tmp_path / "4bit", dtype="float32", adapter=tmp_path / "lora") as model:
        layers = model.module.layers

        def graph(count: int, adapter: str | None) -> mx.array:
            model.adapters.use(adapter)
            model.module.layers = layers[:count]
            cache = model.make_cache()
            mx.eval(model.module(mx.array([[5, 6, 7]]), cache), cache.lengths)
            return DecodeStep(model.module, compiled=True)(mx.array([[8]]), cache)

        def a_layer(adapter: str | None) -> int:
            two, three = (kernels(lambda count=count: graph(count, adapter)) for count in (2, 3))  # type: ignore[misc]
            return three.total() - two.total()

        more = a_layer("lora") - a_layer(None)
        model.module.layers = layers
    assert 0 < more <= most
