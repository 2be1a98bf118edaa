"""Grouped-query attention with rotary positions and an optional sliding window."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.config import MixtralConfig
from mlx_mixtral.model.linear import Linear
from mlx_mixtral.model.rotary import Rotary

__all__ = ["Attention"]


class Attention(Module):
    """Self-attention of one layer (GQA, arXiv 2305.13245).

    ``qkv`` is one matrix with the rows of q, k and v in that order, or three where the checkpoint packs them differently.
    """

    def __init__(self, config: MixtralConfig, qkv: list[Linear], o_proj: Linear, rotary: Rotary) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.qkv = qkv
        self.o_proj = o_proj
        self._rotary = rotary
        self._scale = config.head_dim**-0.5 * rotary.score_scale

    def __call__(
        self, x: mx.array, layer: int, cache: KVCache, mask: mx.array | str | None, *, last_only: bool = False
    ) -> mx.array:
        """``x [B, L, D]`` to ``[B, L, D]``, or to ``[B, 1, D]`` of the last token; all keys and values enter the cache."""
        queries, keys, values = self._enter(x, layer, cache)
        if last_only:
            queries = queries[:, :, -1:]
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._scale, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(x.shape[0], queries.shape[2], -1))

    def remember(self, x: mx.array, layer: int, cache: KVCache) -> None:
        """Put keys and values of ``x [B, L, D]`` into the cache and compute nothing else."""
        self._enter(x, layer, cache)

    def _enter(self, x: mx.array, layer: int, cache: KVCache) -> tuple[mx.array, mx.array, mx.array]:
        """Queries ``[B, H, L, d]``, and all keys and values ``[B, KV, T, d]`` they may attend to."""
        B, L, _ = x.shape
        projected = [projection(x) for projection in self.qkv]
        qkv = projected[0] if len(projected) == 1 else mx.concatenate(projected, axis=-1)
        rotated = (self.heads + self.kv_heads) * self.head_dim
        qk, v = qkv[..., :rotated], qkv[..., rotated:]
        # Queries and keys are rotated in one kernel: [B, H + KV, L, d].
        qk = qk.reshape(B, L, self.heads + self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        qk = self._rotary(qk, cache.positions, cache.length + L)
        values = v.reshape(B, L, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        keys, values = cache.update(layer, qk[:, self.heads :], values)
        return qk[:, : self.heads], keys, values
