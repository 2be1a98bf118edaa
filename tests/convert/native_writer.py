"""The same weights as Mistral's own files hold them, written from the description of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.convert.support import Floats, save
from tests.convert.torch_writer import save_torch

ATTENTION = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
DENSE = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def params(config: dict[str, Any]) -> dict[str, Any]:
    """``params.json`` of a model; no rope_theta, as most have none."""
    entries = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    }
    if config["model_type"] == "mixtral":
        entries["moe"] = {
            "num_experts_per_tok": config["num_experts_per_tok"],
            "num_experts": config["num_local_experts"],
        }
    return entries


def interleaved(matrix: Floats, heads: int) -> Floats:
    """Rows of each head so that those a rotation pairs, i and i + half, become neighbours."""
    size = len(matrix) // heads
    out = np.empty_like(matrix)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = matrix[head * size + i]
            out[head * size + 2 * i + 1] = matrix[head * size + size // 2 + i]
    return out


def native(made: dict[str, Floats], config: dict[str, Any], *, stacked: bool = False) -> dict[str, Floats]:
    """Hub names and order to Mistral's; ``stacked`` puts all experts of a layer into one tensor each."""
    out = {
        "tok_embeddings.weight": made["model.embed_tokens.weight"],
        "norm.weight": made["model.norm.weight"],
        "output.weight": made["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"layers.{layer}"
        out[f"{new}.attention_norm.weight"] = made[f"{old}.input_layernorm.weight"]
        out[f"{new}.ffn_norm.weight"] = made[f"{old}.post_attention_layernorm.weight"]
        for theirs, ours in ATTENTION.items():
            matrix = made[f"{old}.self_attn.{theirs}.weight"]
            if theirs in ("q_proj", "k_proj"):
                heads = config["num_attention_heads" if theirs == "q_proj" else "num_key_value_heads"]
                matrix = interleaved(matrix, heads)
            out[f"{new}.attention.{ours}.weight"] = matrix
        if config["model_type"] != "mixtral":
            for theirs, ours in DENSE.items():
                out[f"{new}.feed_forward.{ours}.weight"] = made[f"{old}.mlp.{theirs}.weight"]
            continue
        moe, block = f"{old}.block_sparse_moe", "block_sparse_moe" if stacked else "feed_forward"
        out[f"{new}.{block}.gate.weight"] = made[f"{moe}.gate.weight"]
        for w in ("w1", "w2", "w3"):
            experts = [made[f"{moe}.experts.{e}.{w}.weight"] for e in range(config["num_local_experts"])]
            if stacked:
                out[f"{new}.block_sparse_moe.{w}"] = np.concatenate([e.T if w == "w2" else e for e in experts])
            else:
                out |= {f"{new}.feed_forward.experts.{e}.{w}.weight": value for e, value in enumerate(experts)}
    return out


def make_native(folder: Path, tensors: dict[str, Any], config: dict[str, Any], file: str, count: int = 1) -> Path:
    """A folder of ``count`` files; ``file`` holds their numbers as ``{}`` where there are several."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params(config)))
    (folder / "tokenizer.model.v3").write_bytes(b"pieces")
    for number in range(count):
        part = dict(list(tensors.items())[number::count])
        path = folder / file.format(f"{number:02}")
        if path.suffix == ".safetensors":
            save(path, part)
        else:
            save_torch(path, part)
    return folder
