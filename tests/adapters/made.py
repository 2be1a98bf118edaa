"""Adapters of random numbers in mlx-lm's format, for models of any size."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig

__all__ = ["EVERYWHERE", "lora"]

EVERYWHERE = ("attention", "router", "expert", "head")


def lora(
    folder: Path, model: Path, *, seed: int = 0, rank: int = 4, parts: Container[str] = EVERYWHERE, size: float = 0.05
) -> Path:
    """A LoRA adapter of all matrices of some parts of the model in a folder: ``A`` and ``B`` both differ from zero."""
    chance, tensors = np.random.default_rng(seed), {}

    def normal(*shape: int) -> mx.array:
        return mx.array((chance.standard_normal(shape) * size).astype(np.float32))

    config = MixtralConfig.from_folder(model)
    for matrix in matrices(config):
        if matrix.part not in parts:
            continue
        if matrix.num_experts is None or config.is_dense:
            tensors[f"{matrix.path}.lora_a"] = normal(matrix.in_features, rank)
            tensors[f"{matrix.path}.lora_b"] = normal(rank, matrix.out_features)
        else:
            tensors[f"{matrix.path}.lora_a"] = normal(matrix.num_experts, rank, matrix.in_features)
            tensors[f"{matrix.path}.lora_b"] = normal(matrix.num_experts, matrix.out_features, rank)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    keys = sorted({name.rpartition(".")[0].split(".", 3)[-1] for name in tensors if name.startswith("model.layers.")})
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": keys}
    settings = {"fine_tune_type": "lora", "num_layers": config.num_hidden_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
