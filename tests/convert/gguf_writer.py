"""GGUF files of small models, written with llama.cpp's own ``gguf`` package from Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

Array = npt.NDArray[Any]
# Types that the package can read and not write: a block of random bytes with a sensible float16 where its scales are.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,), "IQ2_XXS": (0,),
          "IQ3_S": (0,), "IQ4_NL": (0,), "IQ1_S": (0,)}  # fmt: skip
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_EXPERT = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def permuted(weight: Array, heads: int) -> Array:
    """Rows of q or k as llama.cpp's converter orders them: halves become neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def restored(weight: Array, heads: int) -> Array:
    """The inverse, one head and one pair at a time."""
    out, size = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + pair] = weight[head * size + 2 * pair]
            out[head * size + size // 2 + pair] = weight[head * size + 2 * pair + 1]
    return out


def renamed(tensors: Mapping[str, Array], config: Mapping[str, Any], *, merged: bool = True) -> dict[str, Array]:
    """Hub tensors under GGUF's names, q and k permuted, experts stacked or each its own."""
    out: dict[str, Array] = {}
    for name, value in tensors.items():
        path, layer = name.removesuffix(".weight"), ""
        if path.startswith("model.layers."):
            number, _, path = path.removeprefix("model.layers.").partition(".")
            layer = f"blk.{number}."
        if ".experts." in path:
            expert, short = path.rsplit(".", 2)[1:]
            out[f"{layer}{_EXPERT[short]}.{expert}.weight"] = value
            continue
        if path.endswith(("q_proj", "k_proj")):
            key = "num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"
            value = permuted(value, config[key])
        out[f"{layer}{_NAMES[path]}.weight"] = value
    if merged and config["model_type"] == "mixtral":
        for layer in range(config["num_hidden_layers"]):
            for name in _EXPERT.values():
                parts = [out.pop(f"blk.{layer}.{name}.{e}.weight") for e in range(config["num_local_experts"])]
                out[f"blk.{layer}.{name}_exps.weight"] = np.stack(parts)
    return out


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Array:
    """Rows of valid blocks of any type."""
    random = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = random.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = random.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def packed(value: Array, kind: str) -> Array:
    """A tensor's bytes in a type: quantised by the package, or random where it cannot."""
    if kind in HALVES:
        rows = random_blocks(kind, value.size // value.shape[-1], value.shape[-1], seed=value.size % 1000)
        return rows.reshape(*value.shape[:-1], -1)
    return gguf.quants.quantize(value, Type[kind])


def dequantized(blocks: Array, kind: str) -> npt.NDArray[np.float32]:
    return gguf.quants.dequantize(blocks, Type[kind])


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    kind: str | Callable[[str], str] = "F32",
    *,
    keys: Callable[[gguf.GGUFWriter], None] | None = None,
    split_tensors: int = 0,
    architecture: str = "llama",
) -> dict[str, npt.NDArray[np.float32]]:
    """Write a model whose matrices have type ``kind``; what each tensor means afterwards, float32, by its GGUF name."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 1e6))
    if config["model_type"] == "mixtral":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if keys is not None:
        keys(writer)
    meant: dict[str, npt.NDArray[np.float32]] = {}
    for name, value in tensors.items():
        chosen = kind if isinstance(kind, str) else kind(name)
        if value.ndim == 1 or "ffn_gate_inp" in name:
            chosen = "F32"
        raw = packed(np.ascontiguousarray(value, np.float32), chosen)
        meant[name] = dequantized(raw, chosen).reshape(value.shape)
        writer.add_tensor(name, raw, raw_dtype=Type[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def hub_tensors(meant: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """What ``write_gguf`` gave back, under the hub's names and in its order of rows: the oracle's checkpoint."""
    names = {new: old for old, new in _NAMES.items()}
    short = {new: old for old, new in _EXPERT.items()}
    out: dict[str, Array] = {}
    for name, value in meant.items():
        path, prefix = name.removesuffix(".weight"), ""
        if path.startswith("blk."):
            number, _, path = path.removeprefix("blk.").partition(".")
            prefix = f"model.layers.{number}."
        if path in ("attn_q", "attn_k"):
            key = "num_attention_heads" if path == "attn_q" else "num_key_value_heads"
            value = restored(value, config[key])
        if path.endswith("_exps"):
            for expert, part in enumerate(value):
                out[f"{prefix}block_sparse_moe.experts.{expert}.{short[path.removesuffix('_exps')]}.weight"] = part
        elif "." in path:
            kind, _, expert = path.partition(".")
            out[f"{prefix}block_sparse_moe.experts.{expert}.{short[kind]}.weight"] = value
        else:
            out[f"{prefix}{names[path]}.weight"] = value
    return out
