"""What llama.cpp calls the tensors of a model of architecture ``llama``."""

from __future__ import annotations

from mlx_mixtral.config.layout import Matrix, Norm

__all__ = ["gguf_name"]

_NAMES = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate": "ffn_gate_inp",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(item: Matrix | Norm) -> str:
    """``blk.3.ffn_gate``, ``token_embd``: without ``.weight``, and what experts have before that."""
    if item.layer is None:
        return _NAMES[item.path]
    return f"blk.{item.layer}.{_NAMES[item.path.rpartition('.')[2]]}"
