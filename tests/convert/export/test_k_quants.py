"""K-quants and their mixes, beside what llama.cpp's own quantiser makes: tests/goldens/record_k_quants.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConversionError, InvalidRequestError
from mlx_mixtral_convert.calibration.file import Calibration, identity
from mlx_mixtral_convert.calibration.statistics import input_name
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.export.gguf_mixes import GGUF_TYPES, fallback_notes, mix_of, tensor_types
from mlx_mixtral_convert.export.k_blocks import SEARCHED, search_blocks
from mlx_mixtral_convert.export.k_search import search
from mlx_mixtral_convert.rounding import Search
from mlx_mixtral_convert.sources import open_source
from mlx_mixtral_convert.sources.gguf.names import gguf_name
from tests.convert.export_support import add_tokenizer, expected, fields, floats, tensors
from tests.convert.support import CONFIG, Floats, make_checkpoint, weights

GOLDENS = Path(__file__).parents[2] / "goldens"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8}
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    with np.load(GOLDENS / "k_quants.npz") as file:
        return dict(file)


def decoded(blocks: np.ndarray[Any, Any], kind: str) -> Floats:
    found: Floats = quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return found


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("how", ["plain", "weighted"])
def test_the_error_is_below_llama_cpps(kind: str, how: str, goldens: dict[str, Any]) -> None:
    rows, importance = goldens["weights"].astype(np.float32), goldens["importance"]
    weighing = importance if how == "weighted" else np.ones_like(importance)
    ours = decoded(search_blocks(rows, kind, importance if how == "weighted" else None), kind)
    theirs = decoded(goldens[f"{kind}.{how}"], kind)
    error, wanted = ((weighing * np.square(found - rows, dtype=np.float64)).sum(1) for found in (ours, theirs))
    # Gaussian rows, and heavy-tailed ones.
    assert error[:3].sum() <= wanted[:3].sum(), error / wanted
    assert error[3:].sum() <= wanted[3:].sum(), error / wanted


@pytest.mark.parametrize(("kind", "bound"), [("Q2_K", 2e-3), ("Q3_K", 0.02)])
def test_few_bits_hardly_shrink_what_they_are_multiplied_by(kind: str, bound: float, goldens: dict[str, Any]) -> None:
    rows, importance = goldens["weights"].astype(np.float64), goldens["importance"]
    for weighing in (None, importance):
        found = decoded(search_blocks(goldens["weights"].astype(np.float32), kind, weighing), kind)
        m = np.ones_like(importance) if weighing is None else weighing
        # Super-blocks of 256 each on their own; float16 rounds the factor.
        ratio = (m * rows * found).reshape(-1, 256).sum(1) / (m * rows * rows).reshape(-1, 256).sum(1)
        assert np.abs(ratio - 1).max() < bound
        assert np.abs(ratio.mean() - 1) < bound / 2


@pytest.mark.parametrize("kind", SEARCHED)
def test_bytes_mean_the_numbers_that_were_found(kind: str, goldens: dict[str, Any]) -> None:
    rows = goldens["weights"].astype(np.float32)
    found = search(rows, SEARCHED[kind])
    scale = found.d[:, None].astype(np.float32) * found.scales
    meant = scale[..., None] * found.codes - (found.dmin[:, None] * found.minima)[..., None]
    np.testing.assert_array_equal(decoded(search_blocks(rows, kind), kind), meant.reshape(rows.shape))


def test_scales_and_minima_lie_where_llama_cpp_reads_them(goldens: dict[str, Any]) -> None:
    """``get_scale_min_k4`` and the loop over ``aux`` in ``dequantize_row_q3_K``, written from ggml-quants.c."""
    rows = goldens["weights"].astype(np.float32)
    found, blocks = search(rows, SEARCHED["Q4_K"]), search_blocks(rows, "Q4_K").reshape(-1, 144)
    for block, scales, minima in zip(blocks, found.scales, found.minima, strict=True):
        q = [int(byte) for byte in block[4:16]]
        for j in range(8):
            late = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4
            assert (late if j >= 4 else (q[j] & 63, q[j + 4] & 63)) == (scales[j], minima[j])
    found, blocks = search(rows, SEARCHED["Q3_K"]), search_blocks(rows, "Q3_K").reshape(-1, 110)
    for block, scales in zip(blocks, found.scales, strict=True):
        packed = [int(byte) for byte in block[96:108]]
        for j in range(16):
            low = packed[j % 8] >> 4 * (j // 8) & 15
            assert (low | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 == scales[j]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(SEARCHED)),
    scale=st.sampled_from([0.0, 1e-30, 1e-7, 1e-4, 0.02, 30000.0]),
    shift=st.sampled_from([0.0, 1.0, -1.0, 5.0]),
    silent=st.booleans(),
    seed=st.integers(0, 999),
)
def test_odd_rows_stay_finite_and_near(kind: str, scale: float, shift: float, silent: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = (scale * np.clip(random.standard_normal((2, 512)) / 3 + shift, -2, 2)).astype(np.float32)
    rows[:, 100:170] = 0
    importance = random.random(512).astype(np.float32)
    importance[32 * silent : 96 * silent] = 0
    found = decoded(search_blocks(rows, kind, importance + np.float32(0 if silent else 1e-3)), kind)
    assert np.isfinite(found).all()
    heard = importance > 0
    error = np.sqrt(np.average(np.square(found - rows)[:, heard], weights=np.tile(importance[heard], (2, 1))))
    # Below float16's smallest steps nothing but zero is near.
    assert error <= 0.2 * np.abs(rows).max() + 2.0**-17
    if not scale:
        assert not found.any()


def config_of(shape: dict[str, Any]) -> MixtralConfig:
    dense = shape["experts"] == 1
    entries = {key: value for key, value in CONFIG.items() if key not in ("num_local_experts", "num_experts_per_tok")}
    entries |= {} if dense else {"num_local_experts": shape["experts"], "num_experts_per_tok": 2}
    entries |= {
        "model_type": "mistral" if dense else "mixtral",
        "architectures": ["MistralForCausalLM" if dense else "MixtralForCausalLM"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["width"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "num_hidden_layers": shape["layers"],
        "tie_word_embeddings": shape["tied"],
    }
    return MixtralConfig.from_hf(entries)


RECORDED: dict[str, Any] = json.loads((GOLDENS / "gguf_mixes.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_every_tensor_has_the_type_llama_cpp_gives_it(name: str) -> None:
    config = config_of(RECORDED[name]["shape"])
    for mix, kinds in RECORDED[name]["types"].items():
        wanted = {kind: [type_ for type_, count in runs for _ in range(count)] for kind, runs in kinds.items()}
        found: dict[str, list[str]] = {}
        types = tensor_types(config, mix)
        for matrix in matrices(config):
            if matrix.part != "router":
                found.setdefault(gguf_name(matrix).rpartition(".")[2], []).append(types[matrix.path])
        assert found == wanted, mix


def test_what_falls_back_is_said_once_for_each_width() -> None:
    config = config_of(RECORDED["odd width"]["shape"])
    notes = list(fallback_notes(config, "Q4_K_M", tensor_types(config, "Q4_K_M")))
    assert notes == [
        f"rows of 80 weights do not divide into {wanted}'s blocks of 256: 2 matrices are F16 instead, as llama.cpp makes them"
        for wanted in ("Q4_K", "Q6_K")
    ]


def test_short_names_are_the_medium_mixes() -> None:
    assert [mix_of(kind) for kind in ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16")] == [
        "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "F16",
    ]  # fmt: skip
    assert all(mix_of(kind) == kind or kind + "_M" in GGUF_TYPES for kind in GGUF_TYPES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("wide") / "source", **WIDE))


@pytest.mark.parametrize(("kind", "number"), [("Q2_K", 10), ("Q4_K", 15), ("Q6_K", 18)])
def test_a_mix_is_written_whole(kind: str, number: int, wide: Path, tmp_path: Path) -> None:
    report = export(wide, tmp_path / "out.gguf", to="gguf", type=kind)
    found, config = tensors(tmp_path / "out.gguf"), CONFIG | WIDE
    wanted = expected(weights(config), config)
    assert sorted(found) == sorted(wanted)
    bounds = {"F32": 0.0, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q4_K": 0.08, "Q3_K": 0.16, "Q2_K": 0.3}
    for name, tensor in found.items():
        error = np.linalg.norm(floats(tensor) - wanted[name]) / np.linalg.norm(wanted[name])
        assert error <= bounds[gguf.GGMLQuantizationType(tensor.tensor_type).name], name
    assert fields(tmp_path / "out.gguf")["general.file_type"] == number
    assert report.type == mix_of(kind)
    assert report.output_bytes == (tmp_path / "out.gguf").stat().st_size


def calibrated(source: Path) -> Calibration:
    """Expert e hears its own inputs loudly."""
    squares: dict[str, Floats] = {}
    random = np.random.default_rng(1)
    with open_source(source, "auto") as opened:
        for matrix in matrices(opened.config):
            shape = matrix.num_experts or 1, matrix.in_features
            squares.setdefault(input_name(matrix), np.exp(2 * random.standard_normal(shape)).astype(np.float32))
        routed = {name: np.full(len(found), 1000, np.int64) for name, found in squares.items()}
        return Calibration(identity(opened), np.zeros((1, 4), np.int32), squares, routed, {})


def test_a_calibration_weighs_each_experts_own_inputs(wide: Path, tmp_path: Path) -> None:
    found = calibrated(wide)
    found.save(tmp_path / "c.calibration")
    export(wide, tmp_path / "plain.gguf", to="gguf", type="Q3_K_S")
    export(wide, tmp_path / "weighted.gguf", to="gguf", type="Q3_K_S", calibration=tmp_path / "c.calibration")
    wanted = expected(weights(CONFIG | WIDE), CONFIG | WIDE)["blk.1.ffn_down_exps.weight"]
    importance = Search(found).importance
    with open_source(wide, "auto") as opened:
        down = next(m for m in matrices(opened.config) if m.path.startswith("model.layers.1") and "down" in m.path)
    plain, weighted = (
        np.square(floats(tensors(tmp_path / f"{name}.gguf")["blk.1.ffn_down_exps.weight"]) - wanted)
        for name in ("plain", "weighted")
    )
    for expert in range(8):
        weighing = np.array(importance(down, expert))
        assert (weighing * weighted[expert]).sum() < 0.95 * (weighing * plain[expert]).sum(), expert
    assert (
        tensors(tmp_path / "plain.gguf")["token_embd.weight"].data
        == tensors(tmp_path / "weighted.gguf")["token_embd.weight"].data
    ).all()


def test_calibrations_that_do_not_apply(wide: Path, tmp_path: Path) -> None:
    found, dest = calibrated(wide), tmp_path / "out.gguf"
    with pytest.raises(InvalidRequestError, match=r"F16 has no scales .* use Q8_0, Q4_0"):
        export(wide, dest, to="gguf", calibration=found)
    with pytest.raises(InvalidRequestError, match="does not affect hf"):
        export(wide, tmp_path / "hf", to="hf", calibration=found)
    with pytest.raises(ConversionError, match="measured on another model"):
        export(wide, dest, to="gguf", type="Q4_K", calibration=replace(found, identity="other"))
    assert not dest.exists()


def test_blocks_of_the_same_type_move_unchanged(wide: Path, tmp_path: Path) -> None:
    export(wide, tmp_path / "first.gguf", to="gguf", type="Q4_K_M")
    report = export(tmp_path / "first.gguf", tmp_path / "second.gguf", to="gguf", type="Q4_K_M")
    first, second = tensors(tmp_path / "first.gguf"), tensors(tmp_path / "second.gguf")
    assert report.packed_matrices == len([name for name in first if "norm" not in name and "gate_inp" not in name])
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)
    assert report.exact_matrices >= report.packed_matrices
