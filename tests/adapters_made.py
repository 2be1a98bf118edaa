"""Small adapters in mlx-lm's files, with random changes of attention and experts that a greedy text shows."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig

__all__ = ["made_adapter"]

EXPERTS = "block_sparse_moe.switch_mlp"
KEYS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", f"{EXPERTS}.up_proj", f"{EXPERTS}.down_proj")


def made_adapter(
    folder: Path, model: Path, *, seed: int = 1, rank: int = 2, strength: float = 1.0, dropout: float = 0.0
) -> Path:
    """An adapter of the model in ``model``, as ``mlx_lm.lora`` writes one; ``folder`` is made, and returned.

    ``strength`` is about the size of its changes beside the weights'; a ``dropout`` above 0 is worth a note.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, mx.array] = {}

    def matrix(*shape: int) -> mx.array:
        # Of unit gain from its inputs to its outputs, whichever axis they are on.
        return mx.array((random.standard_normal(shape) / np.sqrt(max(shape[-2:]))).astype(np.float32))

    config = MixtralConfig.from_folder(model)
    for each in matrices(config):
        if not each.path.endswith(KEYS):
            continue
        if (count := each.num_experts) is None:
            tensors[f"{each.path}.lora_a"] = matrix(each.in_features, rank)
            tensors[f"{each.path}.lora_b"] = matrix(rank, each.out_features)
        else:
            tensors[f"{each.path}.lora_a"] = matrix(count, rank, each.in_features)
            tensors[f"{each.path}.lora_b"] = matrix(count, each.out_features, rank)
    folder.mkdir(parents=True)
    parameters = {"rank": rank, "scale": 4 * strength, "dropout": dropout, "keys": list(KEYS)}
    settings = {
        "fine_tune_type": "lora",
        "model": "someone/base",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder
