"""A SentencePiece model written field by field, and GGUF files read by the ``gguf`` package."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

from tests.convert.support import Floats

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECES = (
    ("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("c", -2.0, NORMAL),
    ("\u2581", -1.0, NORMAL), ("a", -2.5, NORMAL), ("b", -3.0, NORMAL), ("ab", -3.5, NORMAL), ("[INST]", 0.0, USER_DEFINED),
    ("<free>", 0.0, UNUSED),
)  # fmt: skip


def spm_model(pieces: tuple[tuple[str, float, int], ...] = PIECES) -> bytes:
    """ModelProto with these pieces: piece = 1, score = 2, type = 3 (sentencepiece_model.proto); BPE."""
    out = b""
    for piece, score, kind in pieces:
        text = piece.encode()
        body = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        out += bytes([0x0A, len(body)]) + body
    # TrainerSpec.model_type = BPE.
    return out + b"\x12\x02\x18\x02"


def add_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes(spm_model())
    return folder


def fields(path: Path) -> dict[str, Any]:
    """Every key of a GGUF file with its value."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "." in name}


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a GGUF file by name, as the reader gives them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def floats(tensor: Any) -> Floats:
    """A tensor's weights, ``[…, out, in]``."""
    values: Floats = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    return values.reshape([int(n) for n in reversed(tensor.shape)])


def interleaved(weights: Floats, heads: int) -> Floats:
    """Rows of queries or keys in llama.cpp's order, row by row: pairs (i, i + half) of a head become neighbours."""
    out = np.empty_like(weights)
    size = len(weights) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weights[head * size + i]
            out[head * size + 2 * i + 1] = weights[head * size + size // 2 + i]
    return out


def expected(made: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """What GGUF calls these Hugging Face tensors, and how it arranges them."""
    out = {"token_embd.weight": made["model.embed_tokens.weight"], "output_norm.weight": made["model.norm.weight"]}
    if "lm_head.weight" in made:
        out["output.weight"] = made["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"blk.{layer}"
        out[f"{new}.attn_norm.weight"] = made[f"{old}.input_layernorm.weight"]
        out[f"{new}.ffn_norm.weight"] = made[f"{old}.post_attention_layernorm.weight"]
        q, k = (made[f"{old}.self_attn.{name}_proj.weight"] for name in "qk")
        out[f"{new}.attn_q.weight"] = interleaved(q, config["num_attention_heads"])
        out[f"{new}.attn_k.weight"] = interleaved(k, config["num_key_value_heads"])
        out[f"{new}.attn_v.weight"] = made[f"{old}.self_attn.v_proj.weight"]
        out[f"{new}.attn_output.weight"] = made[f"{old}.self_attn.o_proj.weight"]
        if config["model_type"] != "mixtral":
            for name in ("gate", "up", "down"):
                out[f"{new}.ffn_{name}.weight"] = made[f"{old}.mlp.{name}_proj.weight"]
            continue
        out[f"{new}.ffn_gate_inp.weight"] = made[f"{old}.block_sparse_moe.gate.weight"]
        for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [
                made[f"{old}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(config["num_local_experts"])
            ]
            out[f"{new}.ffn_{name}_exps.weight"] = np.stack(experts)
    return out
