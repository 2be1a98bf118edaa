"""MLX checkpoints as sources: packed again with other bits, or passed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral import load
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.quantization import QuantizationSpec, mlx_entry
from mlx_mixtral.errors import CheckpointError, ConfigError, ConversionError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import detect, open_source
from mlx_mixtral_convert.sources.base import PackedSource
from tests.convert.support import CONFIG, dense_config, load_arrays, make_checkpoint, read_output

RECIPES = [
    pytest.param(Recipe(4, 64), id="4-bit"),
    pytest.param(Recipe(3, 32), id="3-bit"),
    pytest.param(Recipe(8, 128), id="8-bit"),
    pytest.param(Recipe(mode="mxfp4"), id="mxfp4"),
    pytest.param(Recipe(mode="mxfp8"), id="mxfp8"),
    pytest.param(Recipe(mode="nvfp4"), id="nvfp4"),
    pytest.param(
        Recipe(4, 64, overrides={"*.gate": {"bits": 8}, "*.self_attn.*": False, "lm_head": {"bits": 6}}), id="mixed"
    ),
]


def dequantised(folder: Path) -> dict[str, mx.array]:
    """All matrices of a packed folder as float32, by MLX itself and the configuration's words."""
    tensors, entries = read_output(folder), json.loads((folder / "config.json").read_text())["quantization"]
    out = {}
    for name, value in tensors.items():
        path, _, field = name.rpartition(".")
        if field == "weight" and f"{path}.scales" in tensors:
            spec = QuantizationSpec.from_dict(entries.get(path) or entries, path)
            scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            out[name] = mx.dequantize(value, scales, biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)
        elif field == "weight":
            out[name] = value.astype(mx.float32)
    return out


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert mx.array_equal(left[name], right[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_unpacked_it_is_what_mlx_says_it_means(tmp_path: Path, recipe: Recipe) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=recipe)
    assert detect(tmp_path / "packed") == "mlx"
    convert(tmp_path / "packed", tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    same(read_output(tmp_path / "out"), dequantised(tmp_path / "packed"))
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(entries)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "recipe", [Recipe(2, 32), Recipe(8, 32), Recipe(mode="mxfp4")], ids=["down", "up", "other mode"]
)
def test_packed_again_it_is_what_packing_the_unpacked_gives(tmp_path: Path, recipe: Recipe, dense: bool) -> None:
    changes = dense_config() if dense else {}
    convert(make_checkpoint(tmp_path / "source", **changes), tmp_path / "packed", recipe=Recipe(4, 64))
    convert(tmp_path / "packed", tmp_path / "plain", recipe=Recipe(bits=None), dtype="float32")
    convert(tmp_path / "plain", tmp_path / "a", recipe=recipe, dtype="bfloat16")
    convert(tmp_path / "packed", tmp_path / "b", recipe=recipe, dtype="bfloat16")
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))


def test_more_bits_lose_little_and_the_logits_stay(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=Recipe(4, 64))
    report = convert(tmp_path / "packed", tmp_path / "up", recipe=Recipe(8, 32), dtype="float32")
    assert 0 < max(error.relative_rms for error in report.worst) < 0.006
    convert(tmp_path / "packed", tmp_path / "plain", recipe=Recipe(bits=None), dtype="float32")
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    theirs = load_model(tmp_path / "packed")[0]
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(load_model(tmp_path / "plain")[0](tokens)), np.array(theirs(tokens)), atol=1e-5)


@pytest.mark.parametrize("options", [{"q_bits": 4, "q_group_size": 64}, {"q_mode": "mxfp4", "q_group_size": 32}])
def test_a_folder_of_mlx_lm_is_read(
    tmp_path: Path, mlx_lm_folder: Callable[..., Path], options: dict[str, Any]
) -> None:
    """Its router is packed too."""
    folder = mlx_lm_folder(**options)
    convert(folder, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    theirs = load_model(folder)[0]
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(load_model(tmp_path / "out")[0](tokens)), np.array(theirs(tokens)), atol=1e-4)


@pytest.mark.parametrize("extra", [{}, {"quant_method": "mlx"}])
def test_a_folder_that_says_how_it_is_packed_to_others_only_is_read(tmp_path: Path, extra: dict[str, str]) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=RECIPES[-1].values[0])
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = config.pop("quantization") | extra
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert detect(tmp_path / "packed") == "mlx"
    convert(tmp_path / "packed", tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    tokens = [1, 5, 9, 33, 2, 60]
    with load(tmp_path / "packed") as packed, load(tmp_path / "out") as plain:
        np.testing.assert_allclose(packed.logits(tokens), plain.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("entry", [{"desc_act": False}, {"zero_point": True}, {"quant_method": "gptq"}, {"sym": False}])
def test_settings_of_another_library_are_not_taken_for_mlxs(entry: dict[str, Any]) -> None:
    assert mlx_entry({"quantization_config": {"bits": 4, "group_size": 64} | entry}) is None


def apart(packed: Path, folder: Path) -> Path:
    """The same folder as the oldest repositories have it: experts one by one, one file, no index."""
    tensors = {}
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, value in read_output(packed).items():
        before, middle, after = name.partition(".switch_mlp.")
        projection, _, field = after.partition(".")
        if not middle:
            tensors[name] = value
            continue
        for expert in range(len(value)):
            tensors[f"{before}.experts.{expert}.{names[projection]}.{field}"] = value[expert]
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text((packed / "config.json").read_text())
    return folder


@pytest.mark.parametrize("recipe", [Recipe(4, 64), Recipe(mode="mxfp4")], ids=str)
def test_experts_apart_are_read_as_stacked_ones(tmp_path: Path, recipe: Recipe) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=recipe)
    apart(tmp_path / "packed", tmp_path / "apart")
    convert(tmp_path / "packed", tmp_path / "a", recipe=Recipe(8, 32))
    convert(tmp_path / "apart", tmp_path / "b", recipe=Recipe(8, 32))
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_passed_on_is_the_bytes_that_are_there(tmp_path: Path, recipe: Recipe) -> None:
    convert(make_checkpoint(tmp_path / "source", dtype="F16"), tmp_path / "packed", recipe=recipe)
    there = read_output(tmp_path / "packed")
    entries = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]
    with open_source(tmp_path / "packed") as source:
        assert isinstance(source, PackedSource)
        for matrix in matrices(source.config):
            packing = source.native(matrix)
            if f"{matrix.path}.scales" not in there:
                assert packing is None
                continue
            assert packing is not None
            assert (packing.exact, packing.lossless) == (True, True)
            assert packing.spec == QuantizationSpec.from_dict(entries.get(matrix.path) or entries, "")
            for expert in range(matrix.num_experts or 1):
                for field, array in source.read_packed(matrix, expert).items():
                    whole = np.array(there[f"{matrix.path}.{field}"])
                    own = whole if matrix.num_experts is None else whole[expert]
                    assert array.dtype == own.dtype
                    np.testing.assert_array_equal(array, own)


def test_scales_in_bfloat16_are_passed_on_in_float16(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=Recipe(4, 64))
    with open_source(tmp_path / "packed") as source:
        assert isinstance(source, PackedSource)
        head = next(matrix for matrix in matrices(source.config) if matrix.path == "lm_head")
        packing = source.native(head)
        assert packing is not None
        assert not packing.lossless
        theirs = np.array(read_output(tmp_path / "packed")["lm_head.scales"].astype(mx.float16))
        np.testing.assert_array_equal(source.read_packed(head, 0)["scales"], theirs)
    tensors = {file: load_arrays(tmp_path / "packed" / file) for file in ["model-00003-of-00003.safetensors"]}
    for file, held in tensors.items():
        held["lm_head.scales"] = held["lm_head.scales"] * 1e9
        mx.save_safetensors(str(tmp_path / "packed" / file), held)
    with open_source(tmp_path / "packed") as source:
        assert isinstance(source, PackedSource)
        with pytest.raises(ConversionError, match=r"'lm_head\.weight' has scales beyond float16's range"):
            source.read_packed(head, 0)


def test_scales_of_several_types_are_read_as_they_are(tmp_path: Path) -> None:
    source = broken(tmp_path)
    convert(source, tmp_path / "a", recipe=Recipe(bits=None), dtype="float32")
    held = load_arrays(source / "model.safetensors")
    held[f"{EXPERT}.scales"] = held[f"{EXPERT}.scales"].astype(mx.float32)
    mx.save_safetensors(str(source / "model.safetensors"), held)
    convert(source, tmp_path / "b", recipe=Recipe(bits=None), dtype="float32")
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))
    report = convert(source, tmp_path / "c", exact=True)
    assert {packing.how for packing in report.packings} == {"rounded"}


def broken(tmp_path: Path, entries: dict[str, Any] | None = None, **tensors: Any) -> Path:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed", recipe=Recipe(4, 64))
    folder = apart(tmp_path / "packed", tmp_path / "apart")
    held = load_arrays(folder / "model.safetensors")
    for name, value in tensors.items():
        held.pop(name, None)
        if value is not None:
            held[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), held)
    if entries is not None:
        (folder / "config.json").write_text(json.dumps(CONFIG | entries))
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({f"{EXPERT}.scales": None}, f"'{EXPERT}.scales' is missing"),
        ({f"{EXPERT}.biases": None}, f"'{EXPERT}.biases' is missing"),
        ({f"{EXPERT}.weight": mx.zeros((128, 31), mx.uint32)}, rf"'{EXPERT}.weight' has shape \[128, 31\]"),
        ({f"{EXPERT}.weight": mx.zeros((128, 32))}, "has dtype F32; U32 was expected"),
        ({f"{EXPERT}.scales": mx.ones((128, 4), mx.uint8)}, "has dtype U8; F32, F16, BF16 was expected"),
        ({"model.vision.weight": mx.ones((2, 2))}, r"'model\.vision\.weight' has no place"),
        ({f"{EXPERT}.scales": mx.full((128, 4), float("nan"), mx.bfloat16)}, f"'{EXPERT}.weight' holds NaN"),
    ],
)
def test_damaged_modules_are_named(tmp_path: Path, tensors: dict[str, Any], match: str) -> None:
    source = broken(tmp_path, **tensors)
    with pytest.raises(CheckpointError, match=match):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits are not supported"),
        ({"quantization": {"bits": 4, "group_size": 64, "lm_head": {"bits": 8}}}, "lm_head: config.json says 8-bit"),
    ],
)
def test_an_entry_that_contradicts_the_tensors_is_refused(tmp_path: Path, entries: dict[str, Any], match: str) -> None:
    source = broken(tmp_path, entries)
    with pytest.raises(ConfigError, match=match):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[3], RECIPES[6]])
def test_an_exact_conversion_changes_no_byte(tmp_path: Path, recipe: Recipe, dtype: str) -> None:
    convert(make_checkpoint(tmp_path / "source", dtype=dtype), tmp_path / "packed", recipe=recipe)
    own = {"F16": "float16", "BF16": "bfloat16"}[dtype]
    convert(tmp_path / "packed", tmp_path / "out", exact=True, dtype=own)
    left, right = read_output(tmp_path / "packed"), read_output(tmp_path / "out")
    same(left, right)
    assert {name: value.dtype for name, value in left.items()} == {name: value.dtype for name, value in right.items()}
