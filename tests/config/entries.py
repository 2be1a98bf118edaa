"""Entries of configurations that tests start from."""

from __future__ import annotations

from typing import Any

__all__ = ["MIXTRAL", "PARAMS", "SHAPE"]

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 64,
}
MIXTRAL = SHAPE | {"model_type": "mixtral"}
# Mistral's params.json of the 8x7B repositories.
PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
