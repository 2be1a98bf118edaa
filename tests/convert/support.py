"""Small checkpoints with random weights, made with numpy, and readers of what a conversion wrote."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral_convert import Calibration
from mlx_mixtral_convert.calibration.file import identity
from mlx_mixtral_convert.calibration.walk import Sums, Walk
from mlx_mixtral_convert.sources import open_source

Floats = npt.NDArray[np.float32]
Tensors = dict[str, Any]

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


def rounded(values: Floats) -> Floats:
    """Float32 values that bfloat16 holds exactly."""
    return np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Floats]:
    """Random weights under their per-expert (or dense) hub names, the caller's own."""
    return {name: values.copy() for name, values in _weights(json.dumps(config, sort_keys=True), seed).items()}


@functools.lru_cache(maxsize=8)
def _weights(written: str, seed: int) -> dict[str, Floats]:
    config = json.loads(written)
    random = np.random.default_rng(seed)
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> Floats:
        return rounded((random.standard_normal((rows, columns)) * 0.05).astype(np.float32))

    def norm() -> Floats:
        return rounded((1 + 0.1 * random.standard_normal(hidden)).astype(np.float32))

    made = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm()}
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        made[f"{path}.input_layernorm.weight"] = norm()
        made[f"{path}.post_attention_layernorm.weight"] = norm()
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            made[f"{path}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        if config["model_type"] != "mixtral":
            made[f"{path}.mlp.gate_proj.weight"] = matrix(width, hidden)
            made[f"{path}.mlp.up_proj.weight"] = matrix(width, hidden)
            made[f"{path}.mlp.down_proj.weight"] = matrix(hidden, width)
            continue
        made[f"{path}.block_sparse_moe.gate.weight"] = matrix(config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            prefix = f"{path}.block_sparse_moe.experts.{expert}"
            made[f"{prefix}.w1.weight"] = matrix(width, hidden)
            made[f"{prefix}.w2.weight"] = matrix(hidden, width)
            made[f"{prefix}.w3.weight"] = matrix(width, hidden)
    made["lm_head.weight"] = matrix(vocab, hidden)
    return made


def fused(made: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """The same weights with gate and up of all experts in one tensor, as transformers 5 holds them."""
    out = {name: value for name, value in made.items() if ".block_sparse_moe." not in name}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        experts = range(config["num_local_experts"])
        out[f"{new}.gate.weight"] = made[f"{old}.gate.weight"]
        pairs = [[made[f"{old}.experts.{e}.{w}.weight"] for w in ("w1", "w3")] for e in experts]
        out[f"{new}.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        out[f"{new}.experts.down_proj"] = np.stack([made[f"{old}.experts.{e}.w2.weight"] for e in experts])
    return out


def save(path: Path, tensors: Tensors, dtype: str = "BF16") -> None:
    """Write one safetensors file; integer arrays stay int64."""
    kinds = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
    arrays = {
        name: mx.array(value) if value.dtype == np.int64 else mx.array(value).astype(kinds[dtype])
        for name, value in tensors.items()
    }
    mx.save_safetensors(str(path), arrays, {"format": "pt"})


def make_checkpoint(
    folder: Path,
    *,
    layout: str = "per_expert",
    dtype: str = "BF16",
    shards: int = 1,
    seed: int = 0,
    edit: Callable[[Tensors], None] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint folder. ``edit`` may change the tensors before they are written, ``changes`` the configuration."""
    config = CONFIG | {"torch_dtype": _NAMES[dtype]} | changes
    tensors: Tensors = dict(weights(config, seed))
    if layout == "fused":
        tensors = dict(fused(tensors, config))
    if edit is not None:
        edit(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def dense_config(kind: str = "mistral") -> dict[str, Any]:
    """Changes that turn the configuration into a dense model's."""
    return {"model_type": kind, "architectures": ["MistralForCausalLM"], "sliding_window": None}


def read_output(folder: Path) -> dict[str, mx.array]:
    """All tensors of a conversion, through its index and MLX's own reader."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_arrays(folder / file) for file in set(weight_map.values())}
    assert sorted(weight_map) == sorted(name for held in files.values() for name in held)
    return {name: files[file][name] for name, file in weight_map.items()}


def load_arrays(path: Path) -> dict[str, mx.array]:
    """All tensors of one safetensors file, read by MLX."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def measured(folder: Path, sequences: int = 16, length: int = 60) -> Calibration:
    """A calibration on random tokens."""
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (sequences, length)).astype(np.int32)
    with open_source(folder) as source:
        walk = Walk(source, ids)
        sums: Sums = {}
        for _, found in walk.layers():
            sums |= found
        sums |= walk.head_sum()
        squares = {name: np.stack([one.mean_squares for one in found]) for name, found in sums.items()}
        counts = {name: np.array([one.tokens for one in found]) for name, found in sums.items()}
        return Calibration(identity(source), ids, squares, counts, {})


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
