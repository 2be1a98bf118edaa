"""Folders that one worker makes and all of them use."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.demo import checkpoint_path

__all__ = ["SharedFolders", "random_checkpoint", "short_checkpoint"]

SMALL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}


class SharedFolders:
    """Folders under one root, each made once however many processes ask for it; nobody may write to them.

    Example:
        ``shared("four-bit", lambda folder: convert(source, folder))`` gives the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name; ``make`` is called with a path at which nothing is yet, by the first who asks."""
        place = self._root / hashlib.sha256(name.encode()).hexdigest()[:16]
        folder, done = place / "model", place / "done"
        place.mkdir(exist_ok=True)
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder


def short_checkpoint(folder: Path, layers: int = 2) -> None:
    """The bundled checkpoint without its later layers: its tokenizer and vocabulary, and words that mean nothing."""
    source = checkpoint_path()
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    held = mx.load(str(source / "model.safetensors"))
    assert isinstance(held, dict)
    kept = {
        name: value
        for name, value in held.items()
        if name.split(".")[1] != "layers" or int(name.split(".")[2]) < layers
    }
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "pt"})


def random_checkpoint(folder: Path, **changes: Any) -> None:
    """Random weights that spread logits, attention and routing about as trained ones do; no tokenizer."""
    config = SMALL | changes
    random = np.random.default_rng(7)
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    q, kv = (config["head_dim"] * config[f"num_{heads}_heads"] for heads in ("attention", "key_value"))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> mx.array:
        return mx.array(random.standard_normal((rows, columns)) * gain / columns**0.5).astype(mx.bfloat16)

    def norm() -> mx.array:
        return mx.array(1 + 0.1 * random.standard_normal(hidden)).astype(mx.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, hidden**0.5)}
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        tensors |= {f"{path}.{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        for name, rows, columns, gain in (
            ("q", q, hidden, 1.5), ("k", kv, hidden, 1.5), ("v", kv, hidden, 1.0), ("o", hidden, q, 1.0),
        ):  # fmt: skip
            tensors[f"{path}.self_attn.{name}_proj.weight"] = matrix(rows, columns, gain)
        moe = f"{path}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = matrix(experts, hidden, 1.5)
        for expert in range(experts):
            for name, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
                tensors[f"{moe}.experts.{expert}.{name}.weight"] = matrix(rows, columns, 1.3)
    tensors |= {"model.norm.weight": norm(), "lm_head.weight": matrix(config["vocab_size"], hidden, 3.0)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
