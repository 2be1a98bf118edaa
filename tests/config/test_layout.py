"""Where tensors lie in each layout: synthetic checkpoints in which every row holds its own identity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral.config.layout import (
    FIELDS,
    Field,
    Matrix,
    Rows,
    locate,
    matrices,
    module_tensor,
    norms,
)
from mlx_mixtral.config.mixtral import MixtralConfig

Array = npt.NDArray[np.int64]

EXPERTS, WIDTH, HIDDEN, LAYERS = 3, 4, 6, 2
PROJECTIONS = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
# The paper's and Hugging Face's letters.
LETTER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

TINY: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 11, "num_local_experts": EXPERTS,
}  # fmt: skip
SPARSE = MixtralConfig.from_hf(TINY)
DENSE = MixtralConfig.from_hf(TINY | {"model_type": "llama"})

HF_8X7B = MixtralConfig.from_hf(
    {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    }
)  # fmt: skip
HF_8X22B = MixtralConfig.from_hf(
    {
        "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32000,
    }
)  # fmt: skip


def _identity(layer: int, projection: str, expert: int, columns: int) -> Array:
    """One expert's matrix whose every row is filled with a number no other row of the model has."""
    rows = PROJECTIONS[projection][0]
    first = ((layer * 3 + list(PROJECTIONS).index(projection)) * EXPERTS + expert) * 100
    return np.repeat(np.arange(first, first + rows)[:, None], columns, axis=1)


def _stacked_of(layer: int, projection: str) -> Array:
    columns = PROJECTIONS[projection][1]
    return np.stack([_identity(layer, projection, expert, columns) for expert in range(EXPERTS)])


def _stacked() -> dict[str, Array]:
    return {
        f"model.layers.{layer}.block_sparse_moe.switch_mlp.{projection}.weight": _stacked_of(layer, projection)
        for layer in range(LAYERS)
        for projection in PROJECTIONS
    }


def _per_expert() -> dict[str, Array]:
    return {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{LETTER[projection]}.weight": matrix
        for layer in range(LAYERS)
        for projection in PROJECTIONS
        for expert, matrix in enumerate(_stacked_of(layer, projection))
    }


def _fused() -> dict[str, Array]:
    tensors = {}
    for layer in range(LAYERS):
        halves = [_stacked_of(layer, "gate_proj"), _stacked_of(layer, "up_proj")]
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate(halves, axis=1)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = _stacked_of(layer, "down_proj")
    return tensors


def _named(block: str, letters: bool) -> dict[str, Array]:
    """Experts apart, under the names of either, in a block of either name."""
    return {
        f"model.layers.{layer}.{block}.experts.{expert}.{LETTER[projection] if letters else projection}.weight": matrix
        for layer in range(LAYERS)
        for projection in PROJECTIONS
        for expert, matrix in enumerate(_stacked_of(layer, projection))
    }


def _together(gate_up: str, down: str) -> dict[str, Array]:
    """Gate and up one above the other, stacked under ``gate_up`` and ``down`` of the layer."""
    return {
        name.replace("mlp.experts.gate_up_proj", gate_up).replace("mlp.experts.down_proj", down): array
        for name, array in _fused().items()
    }


def _pairs() -> dict[str, Array]:
    """Gate and up of each expert in one."""
    tensors = {name: array for name, array in _named("mlp", False).items() if "down_proj" in name}
    for name, array in _fused().items():
        if "gate_up" in name:
            prefix = name.removesuffix(".gate_up_proj")
            tensors |= {f"{prefix}.{expert}.gate_up_proj.weight": matrix for expert, matrix in enumerate(array)}
    return tensors


def _renamed(block: str, stack: str) -> dict[str, Array]:
    return {
        name.replace("block_sparse_moe.switch_mlp", f"{block}.{stack}"): array for name, array in _stacked().items()
    }


def _dense() -> dict[str, Array]:
    return {
        f"model.layers.{layer}.mlp.{projection}.weight": _stacked_of(layer, projection)[0]
        for layer in range(LAYERS)
        for projection in PROJECTIONS
    }


def _read(tensors: dict[str, Array], rows: Rows) -> Array:
    tensor = tensors[rows.name]
    flat = tensor.reshape(-1, tensor.shape[-1])
    assert rows.of == len(flat)
    assert rows.experts == (tensor.shape[0] if tensor.ndim == 3 else None)
    return flat[rows.start : rows.stop]


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        pytest.param(SPARSE, _stacked(), id="stacked"),
        pytest.param(SPARSE, _per_expert(), id="per expert"),
        pytest.param(SPARSE, _fused(), id="fused"),
        pytest.param(SPARSE, _named("mlp", False), id="mlp.experts.M.gate_proj"),
        pytest.param(SPARSE, _named("mlp", True), id="mlp.experts.M.w1"),
        pytest.param(SPARSE, _named("block_sparse_moe", False), id="block_sparse_moe.experts.M.gate_proj"),
        pytest.param(SPARSE, _pairs(), id="mlp.experts.M.gate_up_proj"),
        pytest.param(SPARSE, _renamed("mlp", "switch_mlp"), id="mlp.switch_mlp"),
        pytest.param(SPARSE, _renamed("mlp", "experts"), id="mlp.experts.gate_proj.weight"),
        pytest.param(
            SPARSE, _together("block_sparse_moe.experts.w13_weight", "block_sparse_moe.experts.w2_weight"), id="w13"
        ),
        pytest.param(
            SPARSE, _together("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"), id="fused.weight"
        ),
        pytest.param(DENSE, _dense(), id="dense"),
    ],
)
def test_the_rows_of_every_expert_hold_that_expert_in_every_layout(
    config: MixtralConfig, tensors: dict[str, Array]
) -> None:
    seen = 0
    for matrix in matrices(config):
        if matrix.part != "expert":
            continue
        projection = matrix.path.rsplit(".", 1)[1]
        assert matrix.layer is not None
        found = locate(matrix, "weight", tensors)
        assert found is not None
        assert len(found) == config.num_local_experts
        for expert, rows in enumerate(found):
            wanted = _identity(matrix.layer, projection, expert, PROJECTIONS[projection][1])
            np.testing.assert_array_equal(_read(tensors, rows), wanted)
            seen += 1
    assert seen == LAYERS * 3 * config.num_local_experts


@pytest.mark.parametrize("field", FIELDS)
def test_scales_and_biases_of_mlx_layouts_are_found_as_weights_are(field: Field) -> None:
    matrix = next(m for m in matrices(SPARSE) if m.path.endswith("layers.1.block_sparse_moe.switch_mlp.up_proj"))
    stacked = f"model.layers.1.block_sparse_moe.switch_mlp.up_proj.{field}"
    assert locate(matrix, field, {stacked}) == [
        Rows(stacked, e * WIDTH, (e + 1) * WIDTH, EXPERTS * WIDTH, EXPERTS) for e in range(EXPERTS)
    ]
    single = [f"model.layers.1.block_sparse_moe.experts.{e}.w3.{field}" for e in range(EXPERTS)]
    assert locate(matrix, field, set(single)) == [Rows(name, 0, WIDTH, WIDTH) for name in single]
    assert locate(matrix, field, set()) is None


def test_the_fused_layout_has_no_scales() -> None:
    names = set(_fused())
    for matrix in matrices(SPARSE):
        for field in ("scales", "biases"):
            assert locate(matrix, field, names) is None


def test_half_present_experts_are_listed_whole_so_that_reading_names_the_absent() -> None:
    matrix = next(m for m in matrices(SPARSE) if m.path.endswith("layers.0.block_sparse_moe.switch_mlp.down_proj"))
    found = locate(matrix, "weight", {"model.layers.0.block_sparse_moe.experts.1.w2.weight"})
    assert found is not None
    assert [rows.name for rows in found] == [
        f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(EXPERTS)
    ]


def test_names_of_another_layer_are_not_taken() -> None:
    for tensors in (_stacked(), _per_expert(), _fused()):
        only_second = {name for name in tensors if ".layers.1." in name}
        for matrix in matrices(SPARSE):
            if matrix.part == "expert":
                assert (locate(matrix, "weight", only_second) is not None) == (matrix.layer == 1)


def test_the_router_is_found_under_both_of_its_names() -> None:
    gate = next(m for m in matrices(SPARSE) if m.part == "router" and m.layer == 1)
    for name in ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"):
        assert locate(gate, "weight", {name}) == [Rows(name, 0, EXPERTS, EXPERTS)]
    assert locate(gate, "weight", {"model.layers.0.mlp.gate.weight"}) is None


def test_only_the_router_is_looked_for_under_the_fused_name() -> None:
    names = {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight", ""}
    assert {m.part for m in matrices(SPARSE) if locate(m, "weight", names)} == {"router"}


@pytest.mark.parametrize(("tied", "dense"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_tensor_of_the_hub_layout_is_asked_for_once(tied: bool, dense: bool) -> None:
    config = replace(DENSE if dense else SPARSE, tie_word_embeddings=tied)
    names = {"model.embed_tokens.weight": (11, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        names["lm_head.weight"] = (11, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        names |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (6, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (2, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (2, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, 6),
        }
        for projection, shape in PROJECTIONS.items():
            if dense:
                names[f"{prefix}.mlp.{projection}.weight"] = shape
            else:
                for e in range(EXPERTS):
                    names[f"{prefix}.block_sparse_moe.experts.{e}.{LETTER[projection]}.weight"] = shape
        if not dense:
            names[f"{prefix}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
    asked: dict[str, tuple[int, ...]] = {}
    for norm in norms(config):
        asked[f"{norm.path}.weight"] = (norm.size,)
    for matrix in matrices(config):
        found = locate(matrix, "weight", names)
        assert found is not None
        for rows in found:
            assert rows.name not in asked
            asked[rows.name] = (rows.of, matrix.in_features)
    assert asked == names


@pytest.mark.parametrize(
    ("config", "total"),
    [
        pytest.param(HF_8X7B, 46_702_792_704, id="8x7B"),
        pytest.param(HF_8X22B, 140_620_634_112, id="8x22B"),
    ],
)
def test_parameter_totals_are_the_published_ones(config: MixtralConfig, total: int) -> None:
    assert sum(m.parameters for m in matrices(config)) + sum(n.size for n in norms(config)) == total


def test_two_of_eight_experts_leave_the_published_active_parameters() -> None:
    parts = {m.path: m for m in matrices(HF_8X7B)}
    experts = sum(m.parameters for m in parts.values() if m.part == "expert")
    others = sum(m.parameters for m in parts.values() if m.part != "expert") + sum(n.size for n in norms(HF_8X7B))
    assert others + experts * 2 // 8 == 12_879_925_248


def test_shapes_and_tensor_names_are_those_of_mlx_lm() -> None:
    matrix = Matrix("model.layers.3.block_sparse_moe.switch_mlp.down_proj", "expert", 6, 4, 3, 8)
    assert matrix.shape == (8, 6, 4)
    assert matrix.parameters == 192
    assert module_tensor(matrix, "scales") == "model.layers.3.block_sparse_moe.switch_mlp.down_proj.scales"
    assert Matrix("lm_head", "head", 11, 6).shape == (11, 6)
