"""Small checkpoints in every packing and layout that experts are cut in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral.config.layout import EXPERT_NAMES
from mlx_mixtral_convert import Recipe, convert
from tests.shared import SharedFolders, random_checkpoint

from .support import rewritten, tensors_of

LAYERS = 3
# 12 groups of 32, 6 of 64: two equal parts, or three that are not. The last row of a tensor ends within a block of the disk.
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": LAYERS, "num_local_experts": 4}
RECIPES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits, "group_size": 64} for bits in (1, 2, 3, 4, 5, 6, 8)},
    "3 bits in 32s": {"bits": 3, "group_size": 32},
    "5 bits in 128s": {"bits": 5, "group_size": 128},
    **{
        mode: {"bits": None, "mode": mode, "overrides": {"*.switch_mlp.*": {"mode": mode}}}
        for mode in ("mxfp4", "mxfp8", "nvfp4")
    },
    "mixed": {"bits": 4, "overrides": {"*.up_proj": {"bits": 6}, "model.layers.1.*.down_proj": {"bits": 3, "group_size": 32}}},
}  # fmt: skip
PACKINGS = ["hugging face", "fused", "unquantised", *RECIPES, "packed apart", "mlx-lm"]

MakeFolder = Callable[[str], Path]


def _apart(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stacked experts as tensors of their own, as the oldest checkpoints have them."""
    out = {}
    for name, tensor in tensors.items():
        head, found, tail = name.partition(".switch_mlp.")
        projection, _, field = tail.partition(".")
        if not found:
            out[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            out[f"{head}.experts.{expert}.{EXPERT_NAMES[projection]}.{field}"] = tensor[expert]
    return out


def _fused(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Gate and up of all experts in one tensor, as transformers 5 holds them."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            mx.stack([tensors[f"{path}.{e}.{name}.weight"] for e in range(SHAPE["num_local_experts"])])
            for name in ("w1", "w2", "w3")
        )
        new = f"model.layers.{layer}.mlp"
        out |= {f"{new}.experts.gate_up_proj": mx.concatenate([w1, w3], axis=1), f"{new}.experts.down_proj": w2}
        out[f"{new}.gate.weight"] = out.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    return out


@pytest.fixture(scope="session")
def folder_of(shared: SharedFolders, mlx_lm_folder: Callable[..., Path]) -> MakeFolder:
    """The folder of a packing by its name."""
    floats = shared("shares floats", lambda place: random_checkpoint(place, **SHAPE))

    def make(name: str) -> Path:
        if name == "mlx-lm":
            return mlx_lm_folder(q_bits=4, q_group_size=64)
        if name == "hugging face":
            return floats
        if name == "fused":
            return shared("shares fused", lambda place: rewritten(floats, place, _fused(tensors_of(floats))))
        if name == "packed apart":
            packed = make("4 bits")
            return shared("shares apart", lambda place: rewritten(packed, place, _apart(tensors_of(packed))))
        recipe = Recipe(**RECIPES.get(name, {"bits": None}))
        return shared(f"shares {name}", lambda place: convert(floats, place, recipe=recipe))

    return make


@pytest.fixture
def floats(folder_of: MakeFolder) -> Path:
    return folder_of("hugging face")
