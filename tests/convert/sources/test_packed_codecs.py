"""Packed modules in every variant the formats have, from packers of our own: what they mean, and what MLX keeps of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.packing.measure import E4M3
from mlx_mixtral_convert.sources import PackedSource, detect, open_source
from mlx_mixtral_convert.sources.packed.codecs.module import powers_of_two
from tests.convert import module_packers as packers
from tests.convert.packers import fp8, make_packed, save
from tests.convert.sources.test_packed_sources import edited, same_weights
from tests.convert.support import CONFIG, Floats, load_arrays, make_checkpoint, read_output

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 2}
Pack = Callable[[Floats], Any]


def scheme(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def words(bits: int, group: int = 32, **kwargs: Any) -> tuple[dict[str, Any], Pack]:
    return scheme(num_bits=bits, type="int"), partial(packers.integers, bits=bits, group=group, **kwargs)


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 64]}
OPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BYTES = ("weight", "weight_packed", "weight.absmax", "bitsandbytes__nf4")
# The packing of MLX, whether the integers fit it, and the configuration and packer.
CASES: dict[str, tuple[str, bool, tuple[dict[str, Any], Pack]]] = {
    **{f"{bits} bits": (f"{have}-bit g32", True, words(bits))
       for bits, have in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 8), (8, 8))},
    **{f"{bits} bits, whole codes to a word": (f"{have}-bit g32", True, words(bits, padded=True))
       for bits, have in ((3, 3), (5, 5), (6, 6), (7, 8))},
    "4 bits, zero points": ("4-bit g32", True, words(4, zeros="packed")),
    "3 bits, zero points": ("3-bit g32", True, words(3, zeros="packed")),
    "3 bits, zero points, whole codes to a word": ("3-bit g32", True, words(3, zeros="packed", padded=True)),
    "4 bits, zero points in bytes": ("4-bit g32", True, words(4, zeros="bytes")),
    "4 bits, act-order": ("8-bit g32", False, words(4, order=True)),
    "4 bits, groups of 16": ("8-bit g32", False, words(4, group=16)),
    "bytes with zero points": ("8-bit", True, (scheme(num_bits=8), packers.bytes_with_zeros)),
    "blocks": ("8-bit g32", False, (FP8, lambda w: packers.fp8_blocks(w, E4M3, 48, 64, "weight_scale_inv"))),
    "blocks of powers of two": (
        "mxfp8", True,
        (FP8 | {"weight_block_size": [48, 32]}, lambda w: packers.fp8_blocks(w, E4M3, 48, 32, "weight_scale_inv", powers=True)),
    ),
    "nvfp4 of ModelOpt": ("8-bit g32", False, (OPT, lambda w: packers.nvfp4(w, E4M3, 0.01, "weight_scale_2", "weight"))),
    "nvfp4, scaled by 1": (
        "nvfp4", True, (scheme(num_bits=4), lambda w: packers.nvfp4(w, E4M3, 1, "weight_global_scale", "weight_packed")),
    ),
    "pairs of rows": ("4-bit g32", True, (OPT | {"quant_algo": "W4A16_AWQ"}, partial(packers.row_pairs, group=32))),
    "pairs of rowswith scaled inputs": (
        "8-bit g32", False, (OPT | {"quant_algo": "W4A16_AWQ"}, partial(packers.row_pairs, group=32, scaled_inputs=True)),
    ),
    "nf4, nested": ("8-bit g32", False, (BNB, packers.lookup)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several blocks, the last of them short."""
    monkeypatch.setattr("mlx_mixtral_convert.packing.measure.BLOCK_VALUES", 700)


def made(folder: Path, case: str) -> dict[str, Floats]:
    entry, pack = CASES[case][2]
    # Weights in bytes that are codes, where others are float8.
    kept = () if case.startswith("blocks") else BYTES
    if "powers" in case:
        kept = ("weight_scale_inv",)
    return make_packed(folder, entry, lambda _, weight: pack(weight), plain_bytes=kept, **SMALL)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_the_numbers_mean_and_mlx_keeps_the_integers_it_has_a_packing_for(
    tmp_path: Path, case: str
) -> None:
    """MLX's own kernels unpack what is handed over to what the numbers mean, up to the rounding of scales and biases."""
    spec, exact, _ = CASES[case]
    meant = made(tmp_path / "source", case)
    with open_source(tmp_path / "source") as source:
        assert isinstance(source, PackedSource)
        for matrix in matrices(source.config):
            packing = source.native(matrix)
            if packing is None:
                assert matrix.part in ("embedding", "head", "router")
            else:
                assert str(packing.spec).startswith(spec)
                assert packing.exact is exact
            for expert in range(matrix.num_experts or 1):
                scratch = np.full(4 * matrix.out_features * matrix.in_features, 7, np.uint8)
                found, true = source.read(matrix, expert, scratch).array, meant[source.name(matrix, expert)]
                np.testing.assert_allclose(found.astype(np.float32), true, rtol=3e-7, atol=1e-12)
                if packing is None or not exact:
                    continue
                fields = {name: mx.array(array) for name, array in source.read_packed(matrix, expert).items()}
                words, *scales = (a.astype(mx.float32) if a.dtype == mx.float16 else a for a in fields.values())
                own = packing.spec
                kept = mx.dequantize(
                    words, *scales, group_size=own.group_size, bits=own.bits, mode=own.mode, dtype=mx.float32
                )
                close = 1e-9 if packing.lossless else 2e-3 * np.abs(true).max()
                np.testing.assert_allclose(np.array(kept), true, rtol=1e-6, atol=close)


def test_a_stacked_module_is_read_expert_by_expert(tmp_path: Path) -> None:
    """Codes and block scales as transformers 5 holds them: gate and up of all experts in one tensor."""
    config = CONFIG | SMALL
    blocks = partial(packers.fp8_blocks, table=E4M3, rows=32, columns=32, field="weight_scale_inv")
    entry = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    meant = make_packed(tmp_path / "source", entry, lambda _, weight: blocks(weight), **SMALL)
    file = tmp_path / "source" / "model.safetensors"
    held = {name: np.array(value) for name, value in load_arrays(file).items()}
    old, new = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"
    experts = range(config["num_local_experts"])
    for field, ending in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        parts = {w: [held.pop(f"{old}.{e}.{w}.{field}") for e in experts] for w in ("w1", "w2", "w3")}
        pairs = zip(parts["w1"], parts["w3"], strict=True)
        held[f"{new}.gate_up_proj{ending}"] = np.stack([np.concatenate(pair) for pair in pairs])
        held[f"{new}.down_proj{ending}"] = np.stack(parts["w2"])
    save(tmp_path / "source", held)
    with open_source(tmp_path / "source") as source:
        for matrix in matrices(source.config):
            for expert in range(matrix.num_experts or 1):
                scratch = np.zeros(4 * matrix.out_features * matrix.in_features, np.uint8)
                name = f"{matrix.path}.weight"
                if matrix.part == "expert":
                    letter = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[matrix.path.rpartition(".")[2]]
                    name = f"{old}.{expert}.{letter}.weight"
                np.testing.assert_array_equal(
                    source.read(matrix, expert, scratch).array.astype(np.float32), meant[name]
                )


CACHE = [
    "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_scale_inv", "attn.k_scale", "k_proj.k_scale",
    "v_proj.v_scale", "qkv_proj.k_scale", "k_proj.output_scale", "k_cache_scale", "k_bmm_quantizer._amax", "k_global_scale",
]  # fmt: skip


@pytest.mark.parametrize("quantised", [True, False])
def test_scales_of_a_cache_are_left_out_under_every_name_and_told_of(tmp_path: Path, quantised: bool) -> None:
    source = tmp_path / "source"
    if quantised:
        make_packed(source, {"quant_method": "fp8"}, lambda _, weight: fp8(weight, ()), **SMALL)
    else:
        make_checkpoint(source, **SMALL)
    held = {name: np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
            for name, value in load_arrays(source / "model.safetensors").items()}  # fmt: skip
    added = {f"model.layers.0.self_attn.{name}": np.ones((), np.float32) for name in CACHE}
    save(source, held | added)
    report = convert(source, tmp_path / "out", recipe=Recipe(bits=None))
    # A scale of a packed k_proj's outputs belongs to that module.
    count = len(CACHE) - quantised
    assert [note for note in report.notes if f"{count} scales for a quantised KV cache" in note]
    assert not [name for name in read_output(tmp_path / "out") if name.endswith(("scale", "_amax", "point"))]


def test_another_left_over_scale_is_still_refused(tmp_path: Path) -> None:
    source = edited(tmp_path, "fp8, one scale", mystery_scale=np.ones((), np.float32))
    with pytest.raises(CheckpointError, match="mystery_scale' has no place"):
        convert(source, tmp_path / "out")


def test_modelopt_may_describe_itself_beside_the_configuration(tmp_path: Path) -> None:
    meant = make_packed(tmp_path / "source", {}, lambda _, weight: fp8(weight, ()), **SMALL)
    entry = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "source" / "hf_quant_config.json").write_text(json.dumps(entry))
    assert detect(tmp_path / "source") == "modelopt"
    same_weights(tmp_path / "source", meant)


def test_a_router_that_would_be_rounded_again_keeps_its_values(tmp_path: Path) -> None:
    """bitsandbytes packs it with everything else."""
    source = Path(__file__).parents[2] / "goldens" / "packed" / "bnb-nf4"
    convert(source, tmp_path / "out", exact=True)
    assert read_output(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"].dtype == mx.float16


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("4 bits", {"weight_packed": np.zeros((64, 13), np.int32)}, r"has shape \[64, 13\]; .* calls for \[64, 12\]"),
    ("4 bits", {"weight_scale": np.ones((64, 7), np.float16)}, "weight_scale' has shape .* one number, or one per row"),
    ("4 bits", {"weight_scale": None}, "weight_scale' is missing"),
    ("4 bits, act-order", {"weight_g_idx": np.full(96, 9, np.int32)}, "weight_g_idx' names group 9; there are 3"),
    ("nf4, nested", {"weight.absmax": np.zeros(7, np.uint8)}, "6144 weights in blocks of 64 were expected"),
    ("nf4, nested", {"weight.nested_absmax": np.zeros(7, np.float32)}, "96 scales in blocks of 256 were expected"),
    ("nf4, nested", {"weight": np.zeros((5, 1), np.uint8)}, "3072 bytes of codes were expected"),
    (
        "nf4, nested", {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": 0}', np.uint8)},
        "says blocksize = 0",
    ),
    ("blocks", {"weight_scale_inv": np.ones((3, 1), np.float32)}, "group of inputs or block of 48 by 64, was expected"),
    ("pairs of rows", {"weight_scale": np.ones((64, 7), np.float16)}, "one per row and group of inputs was expected"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tensors", "match"), BAD)
def test_damaged_modules_are_named(tmp_path: Path, case: str, tensors: dict[str, Any], match: str) -> None:
    source, module = tmp_path / "source", "model.layers.0.block_sparse_moe.experts.1.w2"
    made(source, case)
    held = {name: np.array(value) for name, value in load_arrays(source / "model.safetensors").items()}
    for field, value in tensors.items():
        held.pop(f"{module}.{field}")
        held |= {} if value is None else {f"{module}.{field}": value}
    save(source, held, plain_bytes=() if case == "blocks" else BYTES)
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(source, tmp_path / "out", recipe=Recipe(bits=None))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_packed_words_without_a_number_of_bits_are_refused(tmp_path: Path) -> None:
    entry = scheme(num_bits=None)
    make_packed(tmp_path / "source", entry, lambda _, weight: packers.integers(weight, 4, 32), **SMALL)
    with pytest.raises(ConversionError, match="is packed, but config_groups has no num_bits from 1 to 8"):
        open_source(tmp_path / "source")


def test_a_scale_of_one_byte_is_its_power_of_two_and_255_is_nan() -> None:
    found = powers_of_two(np.arange(256, dtype=np.uint8))
    assert found.dtype == np.float32
    assert [float(value) for value in found[:255]] == [2.0 ** (byte - 127) for byte in range(255)]
    assert np.isnan(found[255])
