"""Adapters that mlx-lm and PEFT wrote for small random models, and their own logits (``tests/goldens/record_adapters.py``).

The models are made anew from a seed; adapters and logits are stored. Needs numpy and safetensors only, for the recording
script imports it where neither MLX nor this project is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

__all__ = ["adapter_folder", "base_folder", "base_name", "base_tensors", "kinds", "logits", "tokens"]

FOLDER = Path(__file__).parents[1] / "goldens" / "adapters"

Array = npt.NDArray[Any]

_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_DENSE = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
BASES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    # Shapes by which transposed experts cannot be told.
    "square": _MIXTRAL | {"intermediate_size": 64},
    "half": _MIXTRAL | {"intermediate_size": 32},
    "dense": _MIXTRAL | _DENSE,
    "tied": _MIXTRAL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
}


def kinds() -> list[str]:
    """Every recorded kind of adapter."""
    return sorted(path.parent.name for path in FOLDER.glob("*/adapter_config.json"))


def base_name(kind: str) -> str:
    """Which of ``BASES`` a kind was recorded on: the last part of its name, where it is one."""
    last = kind.rpartition("-")[2]
    return last if last in BASES else "mixtral"


def base_folder(kind: str, folder: Path) -> Path:
    """The model that a kind was recorded on, made at ``folder / "base"``: float32, Hugging Face layout, no tokenizer."""
    base = folder / "base"
    base.mkdir(parents=True)
    name = base_name(kind)
    write_model(base, BASES[name], base_tensors(name))
    return base


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    """A checkpoint of one file."""
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def base_tensors(name: str) -> dict[str, Array]:
    """The weights of one of ``BASES``, float32, under Hugging Face's names."""
    config, random = BASES[name], np.random.default_rng(11)
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Array:
        return (random.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm() -> Array:
        return (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32)

    def network(path: str, gate: str, down: str, up: str) -> None:
        for projection, rows, columns in ((gate, width, hidden), (down, hidden, width), (up, width, hidden)):
            tensors[f"{path}.{projection}.weight"] = matrix(rows, columns, 1.3)

    q, kv = (config[f"num_{heads}_heads"] * head_dim for heads in ("attention", "key_value"))
    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, hidden**0.5)}
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        tensors |= {f"{path}.{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        for name, rows, columns, gain in (
            ("q", q, hidden, 1.5), ("k", kv, hidden, 1.5), ("v", kv, hidden, 1.0), ("o", hidden, q, 1.0),
        ):  # fmt: skip
            tensors[f"{path}.self_attn.{name}_proj.weight"] = matrix(rows, columns, gain)
        if config["model_type"] != "mixtral":
            network(f"{path}.mlp", "gate_proj", "down_proj", "up_proj")
            continue
        tensors[f"{path}.block_sparse_moe.gate.weight"] = matrix(config["num_local_experts"], hidden, 1.5)
        for expert in range(config["num_local_experts"]):
            network(f"{path}.block_sparse_moe.experts.{expert}", "w1", "w2", "w3")
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 3.0)
    return tensors


def adapter_folder(kind: str) -> Path:
    return FOLDER / kind


def tokens(kind: str) -> list[int]:
    """The sequence whose logits were recorded."""
    vocabulary = BASES[base_name(kind)]["vocab_size"]
    return [int(token) for token in np.random.default_rng(5).integers(3, vocabulary, 24)]


def logits(kind: str) -> npt.NDArray[np.float32]:
    """What the reference implementation computes with the adapter, float32 ``[tokens, vocabulary]``."""
    recorded: npt.NDArray[np.float32] = np.load(FOLDER / kind / "logits.npy")
    return recorded
