"""Exact transcoding: the integers of a GGUF's blocks, in MLX's order, mean the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import ConversionError, InvalidRequestError
from mlx_mixtral_convert import Recipe, convert, verify
from mlx_mixtral_convert.packing.transcode import AFFINE, MICROFLOATS, transcode, transcode_floats
from tests.convert.gguf_writer import dequantized, hub_tensors, packed, random_blocks, renamed, write_gguf
from tests.convert.support import CONFIG, dense_config, make_checkpoint, read_output, weights

LOSSLESS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
FLOATS = ["MXFP4", "NVFP4"]
ROUNDED = ["Q4_K", "Q5_K"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
# What does not fit, and the bits of the groups of 32 it is rounded into.
REQUANTISED = {"Q6_K": 8, "Q3_K": 6, "Q2_K": 4, "IQ4_XS": 8, "IQ4_NL": 8, "IQ2_XXS": 4}
HUB = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def unpacked(fields: Any, bits: int) -> npt.NDArray[np.float32]:
    weight, scales, biases = (mx.array(fields[name]) for name in ("weight", "scales", "biases"))
    group = weight.shape[-1] * 32 // bits // scales.shape[-1]
    return np.array(mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), group, bits))


def blocks_of(kind: str, rows: int = 96, columns: int = 512) -> Any:
    if kind in ROUNDED:
        return random_blocks(kind, rows, columns)
    values = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    values[3] = 0
    values[5, 32:64] = 2.0
    return random_floats(rows, columns) if kind == "NVFP4" else packed(values, kind)


def random_floats(rows: int, columns: int) -> Any:
    """NVFP4, which the package does not write: any codes, and the scales of every code but NaN's, which means 0 there."""
    random = np.random.default_rng(2)
    blocks = random.integers(0, 256, (rows * columns // 64, 36), dtype=np.uint8)
    blocks[:, :4] = random.integers(1, 127, (len(blocks), 4))
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", FLOATS)
def test_small_floats_are_mlx_s_own_bit_for_bit(kind: str) -> None:
    blocks, spec = blocks_of(kind), MICROFLOATS[kind].spec
    fields = transcode_floats(blocks, MICROFLOATS[kind], "t")
    assert [field.dtype for field in fields.values()] == [np.uint32, np.uint8]
    found = mx.dequantize(
        *(mx.array(field) for field in fields.values()), None, spec.group_size, spec.bits, spec.mode, dtype=mx.float32
    )
    np.testing.assert_array_equal(np.array(found), dequantized(blocks, kind))


def test_a_scale_without_a_code_in_mlx_is_an_error_that_says_where() -> None:
    blocks = blocks_of("MXFP4")
    blocks[7, 0] = 255
    with pytest.raises(ConversionError, match=r"m.gguf: tensor 'blk.0.x' has a scale of 2\^128.*without --exact"):
        transcode_floats(blocks, MICROFLOATS["MXFP4"], "m.gguf: tensor 'blk.0.x'")


@pytest.mark.parametrize("kind", LOSSLESS)
def test_dequantised_weights_are_the_package_s_bit_for_bit(kind: str) -> None:
    blocks = blocks_of(kind)
    fields = transcode(blocks, AFFINE[kind], "t")
    assert [field.dtype for field in fields.values()] == [np.uint32, np.float16, np.float16]
    # Equal as numbers: an affine 0 has no sign.
    assert np.array_equal(unpacked(fields, AFFINE[kind].bits), dequantized(blocks, kind))


@pytest.mark.parametrize("kind", ROUNDED)
def test_k_quants_lose_only_the_rounding_of_scale_and_bias(kind: str) -> None:
    blocks = blocks_of(kind)
    found, true = unpacked(transcode(blocks, AFFINE[kind], "t"), AFFINE[kind].bits), dequantized(blocks, kind)
    error, largest = (np.abs(x).reshape(-1, 32).max(axis=1) for x in (found - true, true))
    assert (error <= 2e-3 * largest).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", LOSSLESS + ROUNDED)
def test_every_integer_is_where_mlx_looks_for_it(kind: str) -> None:
    """With one scale and no bias the codes themselves come out."""
    fields = transcode(blocks_of(kind), AFFINE[kind], "t")
    ones = fields | {"scales": np.ones_like(fields["scales"]), "biases": np.zeros_like(fields["biases"])}
    codes = unpacked(ones, AFFINE[kind].bits)
    true = dequantized(blocks_of(kind), kind).reshape(-1, AFFINE[kind].group)
    scales, biases = (fields[name].reshape(-1, 1).astype(np.float64) for name in ("scales", "biases"))
    flat = scales[:, 0] != 0
    np.testing.assert_allclose(
        ((true - biases) / np.where(scales, scales, 1))[flat], codes.reshape(true.shape)[flat], atol=0.05
    )


def test_a_scale_beyond_float16_is_an_error_that_says_where() -> None:
    blocks = packed(np.full((1, 32), 3e4, np.float32), "Q8_0")
    blocks[0, :2] = np.array([6e4], np.float16).view(np.uint8)
    with pytest.raises(
        ConversionError, match=r"m\.gguf: tensor 'blk\.0\.x' has a scale or bias that float16 cannot hold"
    ):
        transcode(blocks, AFFINE["Q8_0"], "m.gguf: tensor 'blk.0.x'")


def exact(tmp_path: Path, kind: Any, config: dict[str, Any] = CONFIG, merged: bool = True, **options: Any) -> Any:
    meant = write_gguf(tmp_path / "m.gguf", config, renamed(weights(config), config, merged=merged), kind)
    report = convert(tmp_path / "m.gguf", tmp_path / "out", exact=True, **options)
    return report, hub_tensors(meant, config), json.loads((tmp_path / "out" / "conversion.json").read_text())


def stored(tmp_path: Path, path: str, bits: int) -> Any:
    out = read_output(tmp_path / "out")
    return unpacked({field: out[f"{path}.{field}"] for field in ("weight", "scales", "biases")}, bits)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_model_keeps_every_weight(tmp_path: Path, kind: str, merged: bool) -> None:
    config = CONFIG | {**WIDE, "num_hidden_layers": 2} if kind in ("TQ1_0", "TQ2_0") else CONFIG
    report, true, manifest = exact(tmp_path, kind, config, merged=merged)
    bits = AFFINE[kind].bits
    for name in ("model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        assert np.array_equal(stored(tmp_path, name, bits), true[f"{name}.weight"]), name
    for projection, short in HUB.items():
        found = stored(tmp_path, f"model.layers.1.block_sparse_moe.switch_mlp.{projection}", bits)
        for expert in range(4):
            expected = true[f"model.layers.1.block_sparse_moe.experts.{expert}.{short}.weight"]
            assert np.array_equal(found[expert], expected)
    entries = manifest["errors"]["model.layers.1.self_attn.k_proj"]
    assert entries == {
        "spec": str(AFFINE[kind].spec),
        "relative_rms": 0.0,
        "worst": 0.0,
        "source_type": kind,
        "packing": "exact",
    }
    assert [(p.type_name, p.how, p.relative_rms) for p in report.packings] == [(kind, "exact", 0.0)]
    assert report.dtype == "float16"
    assert read_output(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"].dtype == mx.float16


def test_a_model_of_small_floats_keeps_every_weight(tmp_path: Path) -> None:
    report, true, _ = exact(tmp_path, "MXFP4")
    assert [(p.type_name, p.spec, p.how, p.relative_rms) for p in report.packings] == [("MXFP4", "mxfp4", "exact", 0.0)]
    out = read_output(tmp_path / "out")
    for path, name in (
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("model.layers.1.block_sparse_moe.switch_mlp.down_proj", "model.layers.1.block_sparse_moe.experts.3.w2"),
    ):
        words, scales = (out[f"{path}.{field}"] for field in ("weight", "scales"))
        found = np.array(mx.dequantize(words, scales, None, 32, 4, "mxfp4", dtype=mx.float32))
        np.testing.assert_array_equal(found if found.ndim == 2 else found[3], true[f"{name}.weight"])
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("kind", ROUNDED)
def test_k_quants_are_reported_as_rounded(tmp_path: Path, kind: str) -> None:
    report, true, manifest = exact(tmp_path, kind, CONFIG | WIDE)
    entry = manifest["errors"]["lm_head"]
    assert entry["packing"] == "rounded"
    assert 0 < entry["relative_rms"] < 1e-3
    found = stored(tmp_path, "lm_head", AFFINE[kind].bits)
    assert entry["worst"] == pytest.approx(np.abs(found - true["lm_head.weight"]).max(), rel=1e-4)
    assert report.packings[0].matrices == 9


@pytest.mark.parametrize("kind", REQUANTISED)
def test_what_does_not_fit_is_rounded_into_the_nearest_packing_and_measured(tmp_path: Path, kind: str) -> None:
    report, true, manifest = exact(tmp_path, kind, CONFIG | WIDE)
    bits, entry = REQUANTISED[kind], manifest["errors"]["model.layers.0.self_attn.q_proj"]
    assert (entry["spec"], entry["packing"], entry["source_type"]) == (f"{bits}-bit g32", "requantised", kind)
    found = stored(tmp_path, "model.layers.0.self_attn.q_proj", bits)
    worst = np.abs(found - true["model.layers.0.self_attn.q_proj.weight"]).max()
    assert entry["worst"] == pytest.approx(worst, rel=1e-4)
    assert 0 < report.packings[0].relative_rms < {8: 0.01, 6: 0.05, 4: 0.2}[bits]


def test_types_may_differ_between_matrices_and_floats_stay_floats(tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return "F16" if "output" in name else "Q5_0" if "down" in name else "Q4_0"

    report, true, _ = exact(tmp_path, kind)
    assert {p.type_name: (p.spec, p.how) for p in report.packings} == {
        "Q4_0": ("4-bit g32", "exact"), "Q5_0": ("5-bit g32", "exact"),
    }  # fmt: skip
    out = read_output(tmp_path / "out")
    assert np.array_equal(np.array(out["lm_head.weight"]), true["lm_head.weight"])
    found = stored(tmp_path, "model.layers.0.block_sparse_moe.switch_mlp.down_proj", 5)
    assert np.array_equal(found[3], true["model.layers.0.block_sparse_moe.experts.3.w2.weight"])


def test_an_override_packs_its_matrices_anew_and_leaves_the_others(tmp_path: Path) -> None:
    recipe = Recipe(overrides={"*.o_proj": {"bits": 8, "group_size": 64}, "lm_head": False})
    report, _, manifest = exact(tmp_path, "Q4_0", recipe=recipe)
    errors = manifest["errors"]
    assert (errors["model.layers.0.self_attn.o_proj"]["spec"], errors["model.layers.0.self_attn.o_proj"]["packing"]) == (
        "8-bit g64", "requantised",
    )  # fmt: skip
    assert errors["model.layers.0.self_attn.v_proj"]["packing"] == "exact"
    assert "lm_head" not in errors
    assert {p.how for p in report.packings} == {"exact", "requantised"}
    assert manifest["recipe"]["exact"] is True


@pytest.mark.parametrize(("dtype", "how"), [("float32", "exact"), ("bfloat16", "rounded")])
def test_another_float_type_says_whether_scales_still_fit(tmp_path: Path, dtype: str, how: str) -> None:
    report, _, _ = exact(tmp_path, "Q4_1", dtype=dtype)
    assert report.packings[0].how == how
    assert (report.packings[0].relative_rms == 0) is (how == "exact")


def test_a_dense_model_runs_on_its_own_packing(tmp_path: Path) -> None:
    config = CONFIG | dense_config("llama") | {"num_hidden_layers": 1}
    exact(tmp_path, "Q8_0", config)
    convert(tmp_path / "m.gguf", tmp_path / "plain", recipe=Recipe(bits=None), dtype="float32")
    with load(tmp_path / "out", dtype="float32") as kept, load(tmp_path / "plain") as plain:
        np.testing.assert_allclose(kept.logits([1, 5, 9]), plain.logits([1, 5, 9]), rtol=1e-3, atol=1e-3)


def test_a_dry_run_says_what_would_be_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "Q4_0")
    report = convert(tmp_path / "m.gguf", tmp_path / "out", exact=True, dry_run=True)
    assert [(p.how, p.matrices, p.relative_rms) for p in report.packings] == [("exact", 16, None)]
    assert not (tmp_path / "out").exists()


def test_a_source_of_floats_has_no_packing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="leave out --exact"):
        convert(make_checkpoint(tmp_path / "source"), tmp_path / "out", exact=True)
    with pytest.raises(InvalidRequestError, match="fit"):
        convert(make_checkpoint(tmp_path / "source"), tmp_path / "out", exact=True, fit="1GB")
