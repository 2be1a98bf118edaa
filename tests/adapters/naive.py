"""What an adapter means, as one formula in numpy and float64: every adapted matrix is built, the network computed plainly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.config.layout import hf_name, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig

__all__ = ["adapted", "forward"]

Array = npt.NDArray[Any]


def adapted(
    adapter: Adapter, config: MixtralConfig, tensors: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The model's tensors with the adapter in them, and the biases of the matrices that got one, under the same names."""
    found = {name: value.astype(np.float64) for name, value in tensors.items()}
    biases: dict[str, Array] = {}
    for matrix in matrices(config):
        for expert in range(matrix.num_experts or 1):
            name = hf_name(matrix, expert)
            change = adapter.low_rank(matrix.path, None if matrix.num_experts is None else expert)
            assert (change is not None) <= (matrix.path in adapter.ranks)
            if change is None:
                continue
            assert change.a.shape[0] <= adapter.ranks[matrix.path]
            assert (change.magnitude is not None) == (matrix.path in adapter.dora)
            weight = found[name] + change.b.astype(np.float64) @ change.a.astype(np.float64)
            if change.magnitude is not None:
                weight *= (change.magnitude / np.sqrt((weight**2).sum(axis=1)))[:, None]
            found[name] = weight
            if change.bias is not None:
                biases[name] = change.bias
        if matrix.path in adapter.token_rows:
            rows = adapter.rows(matrix.path)
            found[f"{matrix.path}.weight"][list(rows.tokens)] = rows.rows
    for item in (*matrices(config), *norms(config)):
        if item.path in adapter.replaced:
            found[f"{item.path}.weight"] = adapter.replacement(item.path).astype(np.float64)
    return found, biases


def forward(
    config: Mapping[str, Any], tensors: Mapping[str, Array], biases: Mapping[str, Array], ids: list[int]
) -> Array:
    """Logits ``[tokens, vocabulary]`` of a Mixtral, or of a dense Mistral or Llama, with Hugging Face's names."""
    length, head_dim = len(ids), config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]

    def linear(x: Array, name: str) -> Array:
        return x @ tensors[f"{name}.weight"].T + biases.get(f"{name}.weight", 0.0)

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def rotated(x: Array) -> Array:
        frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        angles = np.concatenate([np.arange(length)[:, None] * frequencies] * 2, axis=-1)[:, None]
        half = head_dim // 2
        turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * np.cos(angles) + turned * np.sin(angles)

    def softmax(x: Array) -> Array:
        exponentials = np.exp(x - x.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    def attention(x: Array, path: str) -> Array:
        q = rotated(linear(x, f"{path}.q_proj").reshape(length, heads, head_dim))
        k = rotated(linear(x, f"{path}.k_proj").reshape(length, groups, head_dim))
        v = linear(x, f"{path}.v_proj").reshape(length, groups, head_dim)
        seen = np.tril(np.ones((length, length), bool))
        outputs = []
        for head in range(heads):
            own = head * groups // heads
            scores = np.where(seen, q[:, head] @ k[:, own].T / head_dim**0.5, -np.inf)
            outputs.append(softmax(scores) @ v[:, own])
        return linear(np.concatenate(outputs, axis=-1), f"{path}.o_proj")

    def network(x: Array, path: str, gate: str, down: str, up: str) -> Array:
        gated = linear(x, f"{path}.{gate}")
        return linear(gated / (1 + np.exp(-gated)) * linear(x, f"{path}.{up}"), f"{path}.{down}")

    def mixture(x: Array, path: str) -> Array:
        scores = linear(x, f"{path}.gate")
        outputs = np.zeros_like(x)
        for position in range(length):
            chosen = np.argsort(-scores[position])[: config["num_experts_per_tok"]]
            for expert, weight in zip(chosen, softmax(scores[position, chosen]), strict=True):
                one = x[position : position + 1]
                outputs[position] += weight * network(one, f"{path}.experts.{expert}", "w1", "w2", "w3")[0]
        return outputs

    x = tensors["model.embed_tokens.weight"][ids].astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        x = x + attention(norm(x, f"{path}.input_layernorm"), f"{path}.self_attn")
        inner = norm(x, f"{path}.post_attention_layernorm")
        if config["model_type"] == "mixtral":
            x = x + mixture(inner, f"{path}.block_sparse_moe")
        else:
            x = x + network(inner, f"{path}.mlp", "gate_proj", "down_proj", "up_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(norm(x, "model.norm"), head)
