"""Grouped-query attention with rotary positions and an optional sliding window."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.views import CacheView
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.layers.linear import MLX, Linear, Products
from mlx_mixtral.layers.rotary import Rotary

__all__ = ["Attention", "last_of"]


def last_of(x: mx.array, view: CacheView) -> mx.array:
    """The last token of each row of ``x [B, L, D]``, ``[B, 1, D]``."""
    return x[:, -1:] if view.ends is None else mx.take_along_axis(x, mx.array(view.ends)[:, None, None], axis=1)


class Attention(Module):
    """Self-attention of one layer (GQA, arXiv 2305.13245).

    ``qkv`` is one matrix with the rows of q, k and v in that order, or three where the checkpoint packs them differently.
    """

    def __init__(
        self, config: MixtralConfig, qkv: list[Linear], o_proj: Linear, rotary: Rotary, products: Products = MLX
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.qkv = qkv
        self.o_proj = o_proj
        self.rotary = rotary
        self._products = products
        self._scale = config.head_dim**-0.5 * rotary.score_scale

    def __call__(self, x: mx.array, layer: int, view: CacheView, *, last_only: bool = False) -> mx.array:
        """``x [B, L, D]`` to ``[B, L, D]``, or to ``[B, 1, D]`` of the last token; all keys and values enter the cache."""
        queries = (
            self._update_for_last(x, layer, view) if last_only and x.shape[1] > 1 else self._update(x, layer, view)
        )
        y = view.attend(layer, queries, self._scale, self._products.attention, last_only=last_only)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(x.shape[0], y.shape[2], -1), view.adapter)

    def remember(self, x: mx.array, layer: int, view: CacheView) -> None:
        """Put keys and values of ``x [B, L, D]`` into the cache and compute nothing else."""
        self._update_keys(x, layer, view)

    def _update(self, x: mx.array, layer: int, view: CacheView) -> mx.array:
        """Queries ``[B, H, L, d]``; keys and values are put into the cache."""
        B, L, _ = x.shape
        projected = [projection(x, view.adapter) for projection in self.qkv]
        qkv = projected[0] if len(projected) == 1 else mx.concatenate(projected, axis=-1)
        rotated = (self.heads + self.kv_heads) * self.head_dim
        qk, v = qkv[..., :rotated], qkv[..., rotated:]
        # Queries and keys are rotated in one kernel: [B, H + KV, L, d].
        qk = qk.reshape(B, L, self.heads + self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        qk = self.rotary(qk, view.positions, view.frequencies)
        values = v.reshape(B, L, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        view.update(layer, qk[:, self.heads :], values)
        return qk[:, : self.heads]

    def _update_for_last(self, x: mx.array, layer: int, view: CacheView) -> mx.array:
        """Queries ``[B, H, 1, d]`` of the last token alone; keys and values of all are put into the cache."""
        self._update_keys(x, layer, view)
        queries = self._heads_of(self._rows_of_qkv(last_of(x, view), 0, self.heads, view.adapter))
        ends = x.shape[1] - 1 if view.ends is None else mx.array(view.ends, mx.int32)
        return self.rotary(queries, view.positions + ends, view.frequencies)

    def _update_keys(self, x: mx.array, layer: int, view: CacheView) -> None:
        both = self._heads_of(self._rows_of_qkv(x, self.heads, self.heads + 2 * self.kv_heads, view.adapter))
        keys, values = both[:, : self.kv_heads], both[:, self.kv_heads :]
        view.update(layer, self.rotary(keys, view.positions, view.frequencies), values)

    def _heads_of(self, projected: mx.array) -> mx.array:
        """``[B, L, n d]`` to ``[B, n, L, d]``."""
        B, L, _ = projected.shape
        return projected.reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)

    def _rows_of_qkv(self, x: mx.array, first: int, end: int, choice: AdapterChoice) -> mx.array:
        """What heads ``first`` to ``end`` of q, k and v are: both ends are those of a matrix where there are three."""
        if len(self.qkv) == 1:
            return self.qkv[0].part(first * self.head_dim, end * self.head_dim)(x, choice)
        projected = [projection(x, choice) for projection in (self.qkv[:1] if first == 0 else self.qkv[1:])]
        return projected[0] if len(projected) == 1 else mx.concatenate(projected, axis=-1)
