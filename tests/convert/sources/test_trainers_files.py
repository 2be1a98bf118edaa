"""Checkpoints as trainers and merging tools save them: wrapped names, experts of several types, biases of zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert import Recipe, convert, verify
from mlx_mixtral_convert.sources import open_source
from tests.convert.gguf_writer import renamed, write_gguf
from tests.convert.native_writer import make_native, native
from tests.convert.packers import gptq, grouped_packer, make_packed
from tests.convert.support import CONFIG, Tensors, dense_config, load_arrays, make_checkpoint, read_output, weights
from tests.convert.torch_writer import save_torch

TOKENS = [1, 5, 9, 33, 2, 60]
KINDS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}


def logits(folder: Path) -> Any:
    with load(folder, dtype="float32") as model:
        return model.logits(TOKENS)


def retyped(folder: Path, kinds: dict[str, str]) -> None:
    """Give tensors whose name has one of ``kinds`` in it another type."""
    held = load_arrays(folder / "model.safetensors")
    for name in held:
        for part, kind in kinds.items():
            held[name] = held[name].astype(KINDS[kind]) if part in name else held[name]
    mx.save_safetensors(str(folder / "model.safetensors"), held, {"format": "pt"})


@pytest.mark.parametrize("kinds", [
    {".experts.2.": "F16"}, {".experts.0.": "F32", ".experts.3.": "F16"}, {"w2.weight": "F16", ".experts.1.w2": "F32"},
])  # fmt: skip
def test_experts_of_several_types_are_the_same_weights(tmp_path: Path, kinds: dict[str, str]) -> None:
    """Values that all the types hold, so that the checkpoint of one type is the oracle."""

    def small(tensors: Tensors) -> None:
        for name, value in tensors.items():
            tensors[name] = np.round(value * 256) / 256

    source = make_checkpoint(tmp_path / "source", edit=small)
    convert(source, tmp_path / "one", recipe=Recipe(4, 64), dtype="bfloat16")
    alike = logits(source)
    retyped(source, kinds)
    with load(source, dtype="float32") as model:
        np.testing.assert_array_equal(model.logits(TOKENS), alike)
    convert(source, tmp_path / "mixed", recipe=Recipe(4, 64), dtype="bfloat16")
    one, mixed = read_output(tmp_path / "one"), read_output(tmp_path / "mixed")
    assert all(mx.array_equal(one[name], mixed[name]) for name in one)
    progress: list[Any] = []
    convert(source, tmp_path / "plain", recipe=Recipe(None), dtype="float32", progress=progress.append)
    assert progress[-2].done_bytes == progress[-1].total_bytes
    np.testing.assert_array_equal(logits(tmp_path / "plain"), alike)


def test_experts_of_several_types_in_a_gguf_are_the_same_weights(tmp_path: Path) -> None:
    made = renamed(weights(CONFIG), CONFIG, merged=False)

    def kind(name: str) -> str:
        return "F16" if ".1.weight" in name else "Q8_0" if ".2.weight" in name else "BF16"

    meant = write_gguf(tmp_path / "mixed.gguf", CONFIG, made, kind)
    write_gguf(tmp_path / "wide.gguf", CONFIG, meant, "F32")
    for name in ("mixed", "wide"):
        convert(tmp_path / f"{name}.gguf", tmp_path / name, recipe=Recipe(None), dtype="float32")
    np.testing.assert_array_equal(logits(tmp_path / "mixed"), logits(tmp_path / "wide"))
    report = convert(tmp_path / "mixed.gguf", tmp_path / "exact", exact=True)
    assert {packing.how for packing in report.packings} == {"requantised"}


WRAPPERS = ["module.", "base_model.model.", "_orig_mod.", "_orig_mod.module.", "module.base_model.model."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "native", "packed"])
def test_wrapped_names_are_the_models_own(tmp_path: Path, wrapper: str, layout: str) -> None:
    source = tmp_path / "source"
    if layout == "packed":
        convert(make_checkpoint(tmp_path / "hub"), tmp_path / "a", recipe=Recipe(4, 64))
        source.mkdir()
        (source / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
        held = {f"{wrapper}{name}": value for name, value in read_output(tmp_path / "a").items()}
        mx.save_safetensors(str(source / "model.safetensors"), held)
        np.testing.assert_array_equal(logits(source), logits(tmp_path / "a"))
        assert not [problem for problem in verify(source).problems if problem.what != "conversion.json"]
        convert(source, tmp_path / "b", exact=True, dtype="bfloat16")
    else:
        if layout == "safetensors":
            make_checkpoint(source, edit=lambda tensors: wrap(tensors, wrapper))
            np.testing.assert_array_equal(logits(source), logits(make_checkpoint(tmp_path / "hub")))
        elif layout == "bin":
            source.mkdir()
            (source / "config.json").write_text(json.dumps(CONFIG))
            save_torch(source / "pytorch_model.bin", {f"{wrapper}{n}": v for n, v in weights(CONFIG).items()})
        else:
            tensors = {f"{wrapper}{name}": value for name, value in native(weights(CONFIG), CONFIG).items()}
            make_native(source, tensors, CONFIG, "consolidated.{}.pth")
        convert(source, tmp_path / "b")
        convert(make_checkpoint(tmp_path / "hub"), tmp_path / "a")
    a, b = read_output(tmp_path / "a"), read_output(tmp_path / "b")
    assert sorted(a) == sorted(b)
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def wrap(tensors: Tensors, wrapper: str) -> None:
    for name in list(tensors):
        tensors[f"{wrapper}{name}"] = tensors.pop(name)


def biased(tensors: Tensors, value: float, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> None:
    for name, weight in list(tensors.items()):
        if (module := name.removesuffix(".weight")).endswith(names):
            tensors[f"{module}.bias"] = np.zeros(len(weight), np.float32)
    if value:
        tensors["model.layers.1.self_attn.v_proj.bias"][3] = value


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("changes", [{}, dense_config("llama") | {"attention_bias": True, "mlp_bias": True}])
def test_biases_of_zeros_are_left_out_with_a_note(tmp_path: Path, dtype: str, changes: dict[str, Any]) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=dtype, edit=lambda tensors: biased(tensors, 0), **changes)
    np.testing.assert_array_equal(logits(source), logits(make_checkpoint(tmp_path / "hub", dtype=dtype, **changes)))
    report = convert(source, tmp_path / "out")
    assert report.notes[0] == "6 biases of zeros are left out, as model.layers.0.self_attn.k_proj.bias"
    assert not [name for name in read_output(tmp_path / "out") if name.endswith(".bias")]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.get("attention_bias")
    assert not written.get("mlp_bias")


@pytest.mark.parametrize("value", [1e-3, -2.0])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_bias_that_is_not_zero_is_refused_by_name(tmp_path: Path, value: float, dtype: str) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=dtype, edit=lambda tensors: biased(tensors, value))
    for run in (lambda: convert(source, tmp_path / "out"), lambda: load(source)):
        with pytest.raises(
            CheckpointError, match=r"'model\.layers\.1\.self_attn\.v_proj\.bias' is a bias that is not zero"
        ):
            run()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.5])
def test_biases_of_a_gguf_are_judged_alike(tmp_path: Path, value: float) -> None:
    made = renamed(weights(CONFIG), CONFIG) | {"blk.0.attn_q.bias": np.full(128, value, np.float32)}
    write_gguf(tmp_path / "m.gguf", CONFIG, made)
    if value:
        with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.bias' is a bias that is not zero"):
            open_source(tmp_path / "m.gguf")
        return
    with open_source(tmp_path / "m.gguf") as source:
        assert source.notes == ("1 bias of zeros is left out, as blk.0.attn_q.bias",)


def test_biases_of_packed_modules_are_judged_alike(tmp_path: Path) -> None:
    pack = grouped_packer(gptq, 64)
    for number, value in enumerate((0, 1)):

        def with_bias(module: str, weight: Any, value: int = value) -> Any:
            fields, meant = pack(module, weight)
            return fields | {"bias": np.full(len(weight), value, np.float16)}, meant

        entry = {"quant_method": "gptq", "bits": 4, "group_size": 64}
        make_packed(tmp_path / f"{number}", entry, with_bias)
    with open_source(tmp_path / "0") as source:
        assert source.notes[0].endswith(
            "biases of zeros are left out, as model.layers.0.block_sparse_moe.experts.0.w1.bias"
        )
    with pytest.raises(CheckpointError, match="is a bias that is not zero"):
        open_source(tmp_path / "1")
