"""What is written is what MLX's own quantiser gives, matrix by matrix, in every format and from every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral.config.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlx_mixtral_convert import Recipe, convert
from tests.convert.support import CONFIG, dense_config, hashes, load_arrays, make_checkpoint, read_output, weights

FORMATS: list[tuple[str, int | None, int | None]] = [
    ("affine", bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES
]
FORMATS += [("mxfp4", None, None), ("nvfp4", None, None), ("mxfp8", None, None)]
HUB_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def naive(mode: str, bits: int | None, group: int | None, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """Every tensor the output must hold: a loop over experts, quantised one by one and stacked."""
    source = {name: mx.array(value).astype(dtype) for name, value in weights(CONFIG).items()}
    expected = {}

    def pack(path: str, parts: list[mx.array], stacked: bool) -> None:
        packed = [mx.quantize(part, group_size=group, bits=bits, mode=mode) for part in parts]
        for field, arrays in zip(("weight", "scales", "biases"), zip(*packed, strict=True), strict=False):
            expected[f"{path}.{field}"] = mx.stack(list(arrays)) if stacked else arrays[0]

    for name, value in source.items():
        if "norm" in name or name.endswith("gate.weight"):
            expected[name] = value
        elif ".experts." not in name:
            pack(name.removesuffix(".weight"), [value], False)
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        for projection, short in HUB_NAMES.items():
            parts = [source[f"{block}.experts.{e}.{short}.weight"] for e in range(CONFIG["num_local_experts"])]
            pack(f"{block}.switch_mlp.{projection}", parts, True)
    return expected


def same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        bits = {2: mx.uint16, 4: mx.uint32, 1: mx.uint8}[value.dtype.size]
        assert mx.array_equal(found[name].view(bits), value.view(bits)), name


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_packed_weights_equal_a_naive_loop_over_experts(
    tmp_path: Path, mode: str, bits: int | None, group: int | None
) -> None:
    source = make_checkpoint(tmp_path / "source")
    recipe = Recipe(mode=mode) if bits is None else Recipe(bits, group, mode)
    convert(source, tmp_path / "out", recipe=recipe)
    same(read_output(tmp_path / "out"), naive(mode, bits, group))


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_reported_errors_are_those_of_mlx_dequantize(
    tmp_path: Path, mode: str, bits: int | None, group: int | None
) -> None:
    source = make_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "out", recipe=Recipe(mode=mode) if bits is None else Recipe(bits, group, mode))
    reported = json.loads((tmp_path / "out" / "conversion.json").read_text())["errors"]
    out, original = read_output(tmp_path / "out"), weights(CONFIG)
    path = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    floats = {k: v.astype(mx.float32) if v.dtype == mx.bfloat16 else v for k, v in out.items()}
    weight, scales, biases = (floats.get(f"{path}.{field}") for field in ("weight", "scales", "biases"))
    assert weight is not None
    assert scales is not None
    restored = np.array(mx.dequantize(weight, scales, biases, group, bits, mode, dtype=mx.float32))
    true = np.stack([original[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)])
    difference = restored - true
    assert reported[path]["relative_rms"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(true), rel=1e-4)
    assert reported[path]["worst"] == pytest.approx(np.abs(difference).max(), rel=1e-4)
    assert "model.layers.1.block_sparse_moe.gate" not in reported


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bundled_checkpoint_converts_as_mlx_lm_does_but_for_the_router(
    tiny: Path, tmp_path: Path, mlx_lm_folder: Any, bits: int
) -> None:
    theirs: dict[str, mx.array] = {}
    for file in mlx_lm_folder(q_bits=bits, q_group_size=64).glob("*.safetensors"):
        theirs |= load_arrays(file)
    convert(tiny, tmp_path / "out", recipe=Recipe(bits, 64))
    ours = read_output(tmp_path / "out")
    compared = 0
    for name, value in theirs.items():
        if ".gate." in name:
            continue
        assert ours[name].dtype == value.dtype
        assert mx.array_equal(ours[name], value), name
        compared += 1
    assert compared > 100
    routers = [name for name in ours if ".block_sparse_moe.gate." in name]
    assert len(routers) == 6
    assert all(ours[name].dtype == mx.bfloat16 for name in routers)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_every_layout_gives_the_same_bytes(tmp_path: Path, layout: str, shards: int) -> None:
    reference = make_checkpoint(tmp_path / "reference")
    source = make_checkpoint(tmp_path / "source", layout=layout, shards=shards)
    convert(reference, tmp_path / "a")
    convert(source, tmp_path / "b")
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "conversion.json"} == {
        k: v for k, v in b.items() if k != "conversion.json"
    }


def test_two_runs_give_identical_bytes(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "a")
    convert(tiny, tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_an_unquantised_conversion_is_converted_again_like_its_source(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "plain", recipe=Recipe(bits=None))
    convert(tmp_path / "plain", tmp_path / "a")
    convert(source, tmp_path / "b")
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_unquantised_logits_in_mlx_lm_equal_the_source_model(tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="F32")
    convert(make_checkpoint(tmp_path / "laid", dtype="F32", layout=layout), tmp_path / "out", recipe=Recipe(bits=None))
    assert all(value.dtype == mx.float32 for value in read_output(tmp_path / "out").values())
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    theirs, ours = load_model(source)[0], load_model(tmp_path / "out")[0]
    np.testing.assert_allclose(np.array(ours(tokens)), np.array(theirs(tokens)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overrides", [{}, {"*.gate": {"bits": 8}}, {"*.self_attn.*": False, "lm_head": {"bits": 6}}])
def test_mlx_lm_loads_it_and_computes_what_the_packed_weights_mean(tmp_path: Path, overrides: Any) -> None:
    """The reference is an unquantised checkpoint made by hand from the output's own tensors."""
    source = make_checkpoint(tmp_path / "source", dtype="F32")
    recipe = Recipe(4, 32, overrides=overrides)
    convert(source, tmp_path / "out", recipe=recipe, dtype="float32")
    out = read_output(tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    restored = {}
    for name, value in out.items():
        path, _, field = name.rpartition(".")
        if field != "weight":
            continue
        if f"{path}.scales" in out:
            packing = entries["quantization"].get(path, entries["quantization"])
            value = mx.dequantize(
                value, out[f"{path}.scales"], out[f"{path}.biases"], packing["group_size"], packing["bits"]
            )
        restored[name] = value
    plain = {k: v for k, v in entries.items() if not k.startswith("quantization")}
    (tmp_path / "by-hand").mkdir()
    (tmp_path / "by-hand" / "config.json").write_text(json.dumps(plain))
    mx.save_safetensors(str(tmp_path / "by-hand" / "model.safetensors"), restored)
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    expected, found = load_model(tmp_path / "by-hand")[0], load_model(tmp_path / "out")[0]
    np.testing.assert_allclose(np.array(found(tokens)), np.array(expected(tokens)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_models_are_the_one_expert_case(tmp_path: Path, kind: str, tied: bool) -> None:
    changes = dense_config(kind) | {"tie_word_embeddings": tied}
    source = make_checkpoint(tmp_path / "source", dtype="F32", **changes)
    convert(source, tmp_path / "plain", recipe=Recipe(bits=None))
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    theirs, ours = load_model(source)[0], load_model(tmp_path / "plain")[0]
    np.testing.assert_allclose(np.array(ours(tokens)), np.array(theirs(tokens)), rtol=1e-5, atol=1e-6)
    convert(source, tmp_path / "packed")
    packed = read_output(tmp_path / "packed")
    assert packed["model.layers.0.mlp.gate_proj.weight"].shape == (256, 16)
    assert ("lm_head.weight" in packed) is not tied
    assert bool(mx.isfinite(load_model(tmp_path / "packed")[0](tokens)).all())


@pytest.mark.parametrize(
    ("source", "bits", "asked", "expected"),
    [
        ("BF16", 4, "auto", mx.bfloat16),
        ("F16", 4, "auto", mx.float16),
        ("F32", 4, "auto", mx.bfloat16),
        ("F32", None, "auto", mx.float32),
        ("F16", None, "auto", mx.float16),
        ("BF16", 4, "float16", mx.float16),
        ("F16", 4, "bfloat16", mx.bfloat16),
        ("BF16", 4, "float32", mx.float32),
    ],
)
def test_float_type_of_scales_norms_and_router(
    tmp_path: Path, source: str, bits: int | None, asked: str, expected: mx.Dtype
) -> None:
    folder = make_checkpoint(tmp_path / "source", dtype=source)
    report = convert(folder, tmp_path / "out", recipe=Recipe(bits), dtype=asked)
    found = read_output(tmp_path / "out")
    assert {value.dtype for value in found.values() if value.dtype != mx.uint32} == {expected}
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert f"mlx.core.{entries['torch_dtype']}" == str(expected) == f"mlx.core.{report.dtype}"
    if bits and source == "BF16":
        same(found, naive("affine", 4, 64, expected))
