"""AWQ, GPTQ and FP8 folders: decoded they are the weights their integers mean, and some fit MLX as they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral import load
from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConversionError, MixtralError, NonFiniteWeightsError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.packing.measure import E4M3
from mlx_mixtral_convert.sources import detect, open_source
from mlx_mixtral_convert.sources.base import PackedSource
from tests.convert.packers import Grouped, Packer, awq, fp8, gptq, grouped_packer, make_packed, save
from tests.convert.support import CONFIG, Floats, dense_config, load_arrays, make_checkpoint, read_output

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*gate$"]}
GOLDENS = Path(__file__).parents[2] / "goldens"
MODULE = "model.layers.1.block_sparse_moe.experts.2.w2"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several blocks, the last of them short, and groups across their bounds."""
    monkeypatch.setattr("mlx_mixtral_convert.sources.packed.awq.BLOCK_INPUTS", 96)
    monkeypatch.setattr("mlx_mixtral_convert.packing.measure.BLOCK_VALUES", 700)


def as_hub(folder: Path, meant: dict[str, Floats], **changes: Any) -> Path:
    """An unquantised float32 checkpoint of the weights meant."""
    return make_checkpoint(folder, dtype="F32", edit=lambda tensors: tensors.update(meant), **changes)


def same_weights(folder: Path, meant: dict[str, Floats]) -> None:
    """Every matrix and norm of ``folder`` reads as ``meant``, to the last bit."""
    seen = set()
    with open_source(folder) as source:
        for matrix in matrices(source.config):
            for expert in range(matrix.num_experts or 1):
                scratch = np.full(4 * matrix.out_features * matrix.in_features, 7, np.uint8)
                values, name = source.read(matrix, expert, scratch), source.name(matrix, expert)
                assert np.shares_memory(values.array, scratch)
                np.testing.assert_array_equal(values.array.astype(np.float32), meant[name])
                seen.add(name)
        for norm in norms(source.config):
            np.testing.assert_array_equal(source.read_norm(norm).array[0], meant[f"{norm.path}.weight"])
            seen.add(f"{norm.path}.weight")
    assert seen == set(meant)


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "awq": ("awq", AWQ, grouped_packer(awq, 64)),
    "awq, group 128": ("awq", AWQ | {"group_size": 128}, grouped_packer(awq, 128)),
    "awq, one group, older names": (
        "awq", {"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, grouped_packer(awq, -1),
    ),
    "gptq": ("gptq", GPTQ, grouped_packer(gptq, 64)),
    "gptq without g_idx": ("gptq", GPTQ, grouped_packer(partial(gptq, g_idx=False), 64)),
    "gptq v2": ("gptq", GPTQ | {"checkpoint_format": "gptq_v2"}, grouped_packer(partial(gptq, version=2), 64)),
    "gptq, one group": ("gptq", GPTQ | {"group_size": -1}, grouped_packer(gptq, -1)),
    "gptq, 8 bits": ("gptq", GPTQ | {"bits": 8}, grouped_packer(gptq, 64, 8)),
    "gptq, 2 bits": ("gptq", GPTQ | {"bits": 2}, grouped_packer(gptq, 64, 2)),
    "gptq, 3 bits": ("gptq", GPTQ | {"bits": 3}, grouped_packer(gptq, 64, 3)),
    "gptq v2, 3 bits, one group": (
        "gptq", GPTQ | {"bits": 3, "group_size": -1, "format": "gptq_v2"}, grouped_packer(partial(gptq, version=2), -1, 3),
    ),
    "gptq, act-order": ("gptq", GPTQ | {"desc_act": True}, grouped_packer(gptq, 32, act_order=True)),
    "fp8, a scale a row": ("compressed-tensors", FP8, lambda _, weight: fp8(weight, (len(weight), 1))),
    "fp8, a vector of scales": ("compressed-tensors", FP8, lambda _, weight: fp8(weight, (len(weight),), np.float16)),
    "fp8, one scale": ("fp8", {"quant_method": "fp8"}, lambda _, weight: fp8(weight, ())),
    "fp8, one scale in a list": ("compressed-tensors", FP8, lambda _, weight: fp8(weight, (1,), np.float16)),
    "fbgemm": ("fp8", {"quant_method": "fbgemm_fp8"}, lambda _, weight: fp8(weight, (len(weight), 1))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_the_integers_mean(tmp_path: Path, case: str) -> None:
    kind, entry, pack = CASES[case]
    entry = entry | ({"group_size": 32} if case == "gptq, act-order" else {})
    meant = make_packed(tmp_path / "source", entry, pack, shards=2 if case == "awq" else 1)
    assert detect(tmp_path / "source") == kind
    same_weights(tmp_path / "source", meant)


@pytest.mark.parametrize("case", ["awq", "gptq", "fp8, a scale a row"])
def test_a_dense_model_and_a_packed_head_are_read_alike(tmp_path: Path, case: str) -> None:
    _, entry, pack = CASES[case]
    meant = make_packed(tmp_path / "source", entry, pack, head=True, **dense_config())
    same_weights(tmp_path / "source", meant)


@pytest.mark.parametrize("case", ["awq", "gptq, act-order", "fp8, one scale"])
def test_logits_equal_those_of_the_weights_meant(tmp_path: Path, case: str) -> None:
    _, entry, pack = CASES[case]
    entry = entry | ({"group_size": 32} if case == "gptq, act-order" else {})
    meant = make_packed(tmp_path / "source", entry, pack)
    convert(tmp_path / "source", tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    theirs = load_model(as_hub(tmp_path / "reference", meant))[0](tokens)
    np.testing.assert_allclose(np.array(load_model(tmp_path / "out")[0](tokens)), np.array(theirs), atol=1e-5)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("method", ["awq", "gptq", "gptq v2", "gptq, 3 bits"])
def test_the_integers_fit_mlx_as_they_are(tmp_path: Path, method: str, group: int) -> None:
    kept: dict[str, Grouped] = {}
    _, entry, _ = CASES[method]
    bits = entry["bits"]
    packers: dict[str, Packer] = {"awq": awq, "gptq v2": partial(gptq, version=2)}
    packer = grouped_packer(packers.get(method, gptq), group, bits, kept=kept)
    make_packed(tmp_path / "source", entry | {"group_size": group}, packer)
    seen = 0
    with open_source(tmp_path / "source") as source:
        assert isinstance(source, PackedSource)
        for matrix in matrices(source.config):
            if matrix.part in ("embedding", "head", "router"):
                assert source.native(matrix) is None
                continue
            packing = source.native(matrix)
            assert packing is not None
            inputs = matrix.in_features
            assert packing.spec == QuantizationSpec(bits, min(128, inputs if group == -1 else group))
            assert packing.exact
            for expert in range(matrix.num_experts or 1):
                module = source.name(matrix, expert).removesuffix(".weight")
                packed = source.read_packed(matrix, expert)
                assert {field: array.dtype.name for field, array in packed.items()} == {
                    "weight": "uint32", "scales": "float16", "biases": "float16",
                }  # fmt: skip
                scales, biases = (mx.array(packed[field]).astype(mx.float32) for field in ("scales", "biases"))
                words = mx.array(packed["weight"])
                ones = mx.ones_like(scales)
                codes = mx.dequantize(words, ones, mx.zeros_like(ones), packing.spec.group_size, bits, dtype=mx.float32)
                np.testing.assert_array_equal(np.array(codes), kept[module].q.T)
                restored = np.array(
                    mx.dequantize(words, scales, biases, packing.spec.group_size, bits, dtype=mx.float32)
                )
                true = kept[module].values
                size = inputs if group == -1 else group
                largest = np.abs(true).reshape(len(true), -1, size).max(axis=2)
                wrong = np.abs(restored - true).reshape(len(true), -1, size).max(axis=2)
                assert (wrong <= 2e-3 * largest).all()
                seen += 1
    assert seen == 2 * (4 + 3 * 4)


@pytest.mark.parametrize("case", ["gptq, act-order", "fp8, a scale a row", "fp8, one scale"])
def test_what_does_not_fit_mlx_becomes_8_bits(tmp_path: Path, case: str) -> None:
    _, entry, pack = CASES[case]
    entry = entry | ({"group_size": 32} if case == "gptq, act-order" else {})
    make_packed(tmp_path / "source", entry, pack)
    with open_source(tmp_path / "source") as source:
        assert isinstance(source, PackedSource)
        found = {matrix.part: source.native(matrix) for matrix in matrices(source.config)}
    expert = found["expert"]
    assert expert is not None
    assert (expert.spec, expert.exact) == (QuantizationSpec(8, 32), False)
    assert found["router"] is None


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_what_compressed_tensors_wrote_means_what_it_says(tmp_path: Path, strategy: str) -> None:
    with np.load(GOLDENS / "fp8.npz") as archive:
        golden = {name.removeprefix(f"{strategy}."): archive[name] for name in archive if name.startswith(strategy)}
    stored = {"weight": golden["weight"], "weight_scale": golden["weight_scale"]}

    def pack(module: str, weight: Floats) -> Any:
        return (stored, golden["meant"]) if module == "model.layers.1.self_attn.k_proj" else fp8(weight, ())

    same_weights(tmp_path / "source", make_packed(tmp_path / "source", FP8, pack))


def test_every_code_of_e4m3_means_what_mlx_says() -> None:
    theirs = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=mx.float32))
    numbers = ~np.isnan(E4M3)
    assert numbers.sum() == 254
    np.testing.assert_array_equal(E4M3[numbers], theirs[numbers])
    assert (E4M3[1], E4M3[126], E4M3[254]) == (2.0**-9, 448, -448)


def edited(tmp_path: Path, case: str, **tensors: Any) -> Path:
    """The case's folder with some tensors of ``MODULE`` replaced, or without them where None."""
    _, entry, pack = CASES[case]
    make_packed(tmp_path / "source", entry, pack)
    file = tmp_path / "source" / "model.safetensors"
    held = {name: np.array(value) for name, value in load_arrays_raw(file).items()}
    for field, value in tensors.items():
        held.pop(f"{MODULE}.{field}", None)
        if value is not None:
            held[f"{MODULE}.{field}"] = value
    save(tmp_path / "source", held)
    return tmp_path / "source"


def load_arrays_raw(file: Path) -> dict[str, Any]:
    """MLX reads float8 as bytes."""
    return load_arrays(file)


ZEROS = np.zeros((256, 15), np.int32)
BAD: list[tuple[str, dict[str, Any], type[MixtralError], str]] = [
    ("awq", {"qweight": ZEROS}, CheckpointError, r"qweight' has shape \[256, 15\]; the configuration calls for \[256, 16\]"),
    ("awq", {"qzeros": ZEROS}, CheckpointError, "qzeros' has shape"),
    ("awq", {"qzeros": None}, CheckpointError, "qzeros' is missing"),
    ("awq", {"scales": None}, CheckpointError, "scales' is missing"),
    ("awq", {"scales": np.ones((4, 128), np.int32)}, CheckpointError, "scales' has dtype I32"),
    ("awq", {"qweight": None}, CheckpointError, "w2.weight' is missing|has no place"),
    ("awq", {"weight": np.ones((128, 256), np.float16)}, CheckpointError, "has no place"),
    ("awq", {"scales": np.full((4, 128), np.nan, np.float16)}, NonFiniteWeightsError, f"'{MODULE}.weight' holds NaN"),
    ("awq", {"bias": np.ones(128, np.float16)}, CheckpointError, "bias' is a bias that is not zero"),
    ("gptq", {"g_idx": np.full(256, 4, np.int32)}, CheckpointError, "names group 4"),
    ("gptq", {"g_idx": np.full(256, -1, np.int32)}, CheckpointError, "below 0; there are 4"),
    ("gptq", {"g_idx": np.zeros(255, np.int32)}, CheckpointError, r"g_idx' has shape \[255\]"),
    ("fp8, one scale", {"weight_scale": np.ones((2, 3), np.float32)}, CheckpointError, r"has shape \[2, 3\]; one number"),
    ("fp8, one scale", {"weight_scale": None}, CheckpointError, "w2.weight' has dtype F8_E4M3"),
    ("fp8, one scale", {"weight": np.full((128, 256), 127, np.uint8)}, NonFiniteWeightsError, "holds NaN"),
    ("fp8, one scale", {"weight": np.ones((128, 256), np.float16)}, CheckpointError, "dtype F16; F8_E4M3, F8_E5M2, I8 was"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tensors", "kind", "match"), BAD)
def test_damaged_modules_are_named(
    tmp_path: Path, case: str, tensors: dict[str, Any], kind: type[MixtralError], match: str
) -> None:
    source = edited(tmp_path, case, **tensors)
    with pytest.raises(kind, match=match) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (AWQ | {"bits": 3}, "AWQ with 3 bits is not supported; 4 can be converted"),
        (AWQ | {"bits": "4"}, "AWQ with bits = '4' is not supported; it must be an integer"),
        (AWQ | {"version": "gemv"}, "AWQ version 'gemv' is not supported"),
        (AWQ | {"group_size": 0}, "AWQ with groups of 0 is not supported"),
        ({"quant_method": "awq"}, "AWQ with bits = None"),
        (GPTQ | {"bits": 5}, "GPTQ with 5 bits is not supported; 2 or 3 or 4 or 8"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format 'marlin' is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (FP8 | {"format": "marlin-24"}, "format 'marlin-24' is not supported; float-quantized, int-quantized"),
        (FP8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask' is not supported"),
        (FP8 | {"transform_config": {"config_groups": {"u": {}}}}, "the weights are rotated"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size is \[128\]; a number of rows and a number of columns",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt's 'W4A8_AWQ' is not supported; FP8"),
        ({"quant_method": "hqq"}, r"quantised with hqq \(HQQ: .*call model.dequantize\(\), save that"),
        ({"quant_method": "quanto"}, r"quantised with quanto \(.*convert from the original"),
        ({"quant_method": "torchao"}, r"quantised with torchao \(.*convert from the original"),
        ({"quant_method": "exl2"}, r"quantised with exl2 \(EXL2: .*--fit mixes bits here"),
        ({"quant_method": "aqlm"}, r"quantised with aqlm \(.*--recipe experts-2bit"),
        ({"quant_method": "eetq"}, r"quantised with eetq \(.*--bits 8"),
        ({"quant_method": "higgs"}, r"quantised with higgs \("),
        ({"quant_method": "a\nb"}, r"quantised with a\\nb, which is not supported; convert from the original"),
    ],
)
def test_variants_that_are_not_read_are_named(tmp_path: Path, entry: dict[str, Any], match: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": entry}))
    with pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_a_kind_that_a_plain_folder_is_not_is_refused_as_that(tmp_path: Path, kind: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(ConversionError, match=f"is not a {kind.upper()} folder: .*; leave out --kind"):
        convert(source, tmp_path / "out", kind=kind)
    convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("case", "name", "settings"),
    [
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
        ("awq", "quantize_config.json", AWQ),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False, "sym": False}),
        ("gptq v2", "quantize_config.json",
         {"bits": 4, "group_size": 64, "method": "gptq", "format": "gptq_v2", "checkpoint_format": None}),
    ],
)  # fmt: skip
def test_settings_in_a_file_of_their_own_are_read(
    tmp_path: Path, case: str, name: str, settings: dict[str, Any]
) -> None:
    kind, _, pack = CASES[case]
    meant = make_packed(tmp_path / "source", settings, pack, settings=name)
    assert detect(tmp_path / "source") == kind
    same_weights(tmp_path / "source", meant)
    with pytest.raises(CheckpointError, match=r"holds weights packed by GPTQ or AWQ .*which must be converted first"):
        load(tmp_path / "source")


def test_a_file_of_its_own_adds_what_the_configuration_leaves_out(tmp_path: Path) -> None:
    """That zero points are stored as they are may be said there alone."""
    meant = make_packed(tmp_path / "source", *CASES["gptq v2"][1:])
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["quantization_config"]["checkpoint_format"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "quantize_config.json").write_text(json.dumps({"bits": 8, "checkpoint_format": "gptq_v2"}))
    same_weights(tmp_path / "source", meant)


@pytest.mark.parametrize("case", ["awq", "gptq"])
def test_packed_weights_without_settings_say_which_file_is_missing(tmp_path: Path, case: str) -> None:
    meant = make_packed(tmp_path / "source", *CASES[case][1:], settings="kept.json")
    for kind in ("auto", case):
        with pytest.raises(
            ConversionError, match=r"quantize_config\.json or quant_config\.json; put that file next to them"
        ):
            convert(tmp_path / "source", tmp_path / "out", kind=kind)
    name = {"gptq": "quantize_config.json", "awq": "quant_config.json"}[case]
    (tmp_path / "source" / "kept.json").rename(tmp_path / "source" / name)
    same_weights(tmp_path / "source", meant)


def test_inputs_out_of_order_need_their_order(tmp_path: Path) -> None:
    make_packed(tmp_path / "source", GPTQ | {"desc_act": True}, grouped_packer(partial(gptq, g_idx=False), 64))
    with pytest.raises(CheckpointError, match=r"g_idx' is missing, but desc_act says that inputs are reordered"):
        convert(tmp_path / "source", tmp_path / "out")


def test_three_bits_that_autogptq_packed_mean_what_was_packed(tmp_path: Path) -> None:
    with np.load(GOLDENS / "gptq3.npz") as archive:
        golden = dict(archive)
    meant = golden.pop("meant")
    changes = {"num_key_value_heads": 2, "head_dim": 32}
    pack = grouped_packer(gptq, 32, 3)

    def with_golden(module: str, weight: Floats) -> Any:
        return (golden, meant) if module == "model.layers.1.self_attn.k_proj" else pack(module, weight)

    whole = make_packed(tmp_path / "source", GPTQ | {"bits": 3, "group_size": 32}, with_golden, **changes)
    same_weights(tmp_path / "source", whole)


def test_scales_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    source = edited(tmp_path, "gptq", scales=np.full((4, 128), 1e5, np.float32))
    with open_source(source) as opened:
        assert isinstance(opened, PackedSource)
        matrix = next(
            m for m in matrices(opened.config) if m.path == "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
        )
        with pytest.raises(
            ConversionError, match=f"safetensors: tensor '{MODULE}.weight' has scales beyond float16's range"
        ):
            opened.read_packed(matrix, 2)


def test_what_serves_activations_and_the_cache_is_left_out(tmp_path: Path) -> None:
    source = edited(tmp_path, "fp8, one scale", input_scale=np.ones((), np.float32))
    file = source / "model.safetensors"
    held = {name: np.array(value) for name, value in load_arrays_raw(file).items()}
    save(source, held | {"model.layers.0.self_attn.k_scale": np.ones((), np.float32)})
    convert(source, tmp_path / "out")
    assert not [name for name in read_output(tmp_path / "out") if name.endswith("_scale")]


@pytest.mark.parametrize("case", ["awq", "gptq, one group"])
def test_an_exact_conversion_keeps_the_integers(tmp_path: Path, case: str) -> None:
    """What mlx-lm computes with is what the integers mean, but for the rounding of scales and biases to float16."""
    _, entry, pack = CASES[case]
    meant = make_packed(tmp_path / "source", entry, pack)
    report = convert(tmp_path / "source", tmp_path / "out", exact=True)
    assert report.dtype == "float16"
    out = read_output(tmp_path / "out")
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["group_size"]
    path = MODULE.replace("experts.2.w2", "switch_mlp.down_proj")
    words, *floats = (out[f"{path}.{field}"][2] for field in ("weight", "scales", "biases"))
    scales, biases = (array.astype(mx.float32) for array in floats)
    count = scales.shape[-1]
    true = meant[f"{MODULE}.weight"].reshape(128, count, -1)
    restored = np.array(mx.dequantize(words, scales, biases, 256 // count, 4, dtype=mx.float32)).reshape(true.shape)
    assert group in (64, 128)
    assert 0 < np.abs(restored - true).max() <= 2e-3 * np.abs(true).max()
    tokens = mx.array([[1, 5, 9, 33, 2, 60]])
    ours = load_model(tmp_path / "out")[0]
    ours.set_dtype(mx.float32)
    theirs = np.array(load_model(as_hub(tmp_path / "reference", meant))[0](tokens))
    np.testing.assert_allclose(np.array(ours(tokens)), theirs, atol=2e-2 * np.abs(theirs).max())


def test_the_kind_can_be_forced(tmp_path: Path) -> None:
    make_packed(tmp_path / "source", *CASES["awq"][1:])
    with pytest.raises(ConversionError, match="quantised with awq"):
        open_source(tmp_path / "source", "hf")
    with pytest.raises(CheckpointError, match="qweight' has shape"):
        open_source(tmp_path / "source", "gptq")
    with open_source(tmp_path / "source", "awq") as source:
        assert source.config.num_local_experts == 4


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    """GPTQ writes them to every module."""
    source = edited(tmp_path, "gptq", bias=np.zeros(128, np.float16))
    with open_source(source) as opened:
        assert opened.config.num_local_experts == 4
