"""The decoder: embeddings, layers of attention and experts, the final norm and the output head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.cache.quantized import PACKED_QUERIES
from mlx_mixtral.cache.views import CacheView
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.experts.store import Counters
from mlx_mixtral.layers.attention import Attention, last_of
from mlx_mixtral.layers.expert_bank import FeedForward
from mlx_mixtral.layers.linear import Linear
from mlx_mixtral.layers.norm import RMSNorm
from mlx_mixtral.model.moe import SparseMoe
from mlx_mixtral.model.stages import through_stages

__all__ = ["DecoderLayer", "MixtralModel"]


class DecoderLayer(Module):
    """``h = x + Attention(norm(x))``, then ``h + MoE(norm(h))``."""

    def __init__(
        self, input_norm: RMSNorm, attention: Attention, post_attention_norm: RMSNorm, moe: SparseMoe | FeedForward
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.moe = moe

    def __call__(self, x: mx.array, layer: int, view: CacheView, *, last_only: bool = False) -> mx.array:
        """``x [B, L, D]`` to ``[B, L, D]``, or with ``last_only`` to the last token's ``[B, 1, D]``."""
        choice = view.adapter
        attended = self.attention(self.input_norm(x, choice), layer, view, last_only=last_only)
        h = (last_of(x, view) if last_only else x) + attended
        normed = self.post_attention_norm(h, choice)
        return self.moe(normed, h, choice) if isinstance(self.moe, SparseMoe) else h + self.moe(normed, choice)


class MixtralModel(Module):
    """Token ids in, logits out. Built by ``mlx_mixtral.model.build``, which also fills the weights.

    ``lm_head`` is None when the output head is the embedding matrix itself. Where several machines hold a model, ``config`` is
    the whole one's, ``layers`` are this machine's, counted from 0, and ``embed_tokens``, ``norm`` and ``lm_head`` are None
    unless it holds them (``distributed.shares``). ``kv`` says how caches it makes are kept.
    ``min_prompt_tokens`` of a row come together at least when they are part of a prompt: see ``Products``.
    """

    def __init__(
        self,
        config: MixtralConfig,
        embed_tokens: Linear | None,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm | None,
        lm_head: Linear | None,
        dtype: mx.Dtype,
        min_prompt_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed_tokens = embed_tokens
        self.layers = list(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.min_prompt_tokens = min_prompt_tokens
        self.kv = KVOptions()
        self.adapter: int | None = None
        """The number of the adapter that caches are made for where nobody names one."""
        self.link: Link | None = None
        """To the machines that hold the rest of it."""

    def join(self, link: Link) -> None:
        """Compute together with other machines."""
        self.link = link
        for layer in self.layers:
            if link.share.split == "experts" and isinstance(layer.moe, SparseMoe):
                layer.moe.share_with(link.group)

    def make_cache(
        self,
        left_padding: Sequence[int] | None = None,
        *,
        max_tokens: int | None = None,
        adapter: int | Literal["in use"] | None = "in use",
    ) -> KVCache:
        """An empty cache; ``left_padding`` has one entry a row of the batch to come.

        ``max_tokens`` are allocated at most while no more are held. Tokens are computed with ``adapter``, by its number, None
        for the model itself.
        """
        c = self.config
        cache = KVCache(
            len(self.layers),
            c.num_key_value_heads,
            c.head_dim,
            window=self.kv.window(c),
            left_padding=left_padding,
            max_tokens=max_tokens,
            storage=self.kv.storage(c, self.dtype),
        )
        cache.adapter = self.adapter if adapter == "in use" else adapter
        if self.link is not None and self.link.is_leader:
            cache.mirror = self.link
            own = -1 if cache.adapter is None else cache.adapter
            self.link.made("cache", cache, None, max_tokens or -1, own, *(left_padding or ()))
        return cache

    def hidden(
        self,
        tokens: mx.array,
        cache: KVCache,
        *,
        last_only: bool = False,
        total: int | None = None,
        ends: tuple[int, ...] | None = None,
    ) -> mx.array:
        """Hidden states before the final norm, ``[B, L, D]``, of ``tokens [B, L]`` (int32); the cache moves on by L.

        ``last_only`` gives ``[B, 1, D]``: in the last layer no token but the last needs its query, nor its experts. ``total``
        is the length of the prompt these tokens are a chunk of, by which some rope scalings turn all of it; None where they
        are its end. ``ends`` is the last token of each row, where shorter ones were filled up behind it.
        """
        if self.link is None:
            return self._hidden(tokens, cache, last_only, total, ends)
        numbers = (last_only, -1 if total is None else total, len(ends or ()), *(ends or ()))
        with self.link.forward("hidden", cache, tokens, *numbers) as sent:
            x = self._hidden(sent, cache, last_only, total, ends)
            mx.async_eval(x, cache.arrays)
        return x

    def _hidden(
        self, tokens: mx.array, cache: KVCache, last_only: bool, total: int | None, ends: tuple[int, ...] | None
    ) -> mx.array:
        x = self.through_layers(tokens, self._chunk(tokens, cache, total, ends), last_only=last_only)
        cache.advance(tokens.shape[1])
        return x

    def remember(self, tokens: mx.array, cache: KVCache, *, total: int | None = None) -> None:
        """Take ``tokens [B, L]`` into the cache: of the last layer only keys and values, for nothing reads the rest."""
        if self.link is None:
            self._remember(tokens, cache, total)
            return
        with self.link.forward("remember", cache, tokens, -1 if total is None else total) as sent:
            self._remember(sent, cache, total)
            mx.async_eval(cache.arrays)

    def _remember(self, tokens: mx.array, cache: KVCache, total: int | None) -> None:
        chunk = self._chunk(tokens, cache, total)
        if self.link is not None and self.link.share.split == "layers":
            through_stages(self, self.link, tokens, chunk, remembers=True)
        else:
            self.remember_stage(self.embed(tokens, chunk.adapter), chunk)
        cache.advance(tokens.shape[1])

    def through_layers(self, tokens: mx.array, view: CacheView, *, last_only: bool = False) -> mx.array:
        """As ``hidden``, for tokens whose place in a cache ``view`` tells."""
        if self.link is not None and self.link.share.split == "layers":
            return through_stages(self, self.link, tokens, view, last_only=last_only)
        return self.stage(self.embed(tokens, view.adapter), view, last_only=last_only)

    def embed(self, tokens: mx.array, choice: AdapterChoice = None) -> mx.array:
        """What enters the first layer, ``[B, L, D]``, of ``tokens [B, L]``."""
        assert self.embed_tokens is not None, "this machine does not hold the embedding"
        return self.embed_tokens.rows(tokens, self.dtype, choice)

    def stage(self, x: mx.array, view: CacheView, *, last_only: bool = False) -> mx.array:
        """Hidden states ``x [B, L, D]`` through the layers held; ``last_only`` where those include the model's last."""
        return self.layers[-1](self._before_last(x, view), len(self.layers) - 1, view, last_only=last_only)

    def remember_stage(self, x: mx.array, view: CacheView) -> None:
        """As ``stage``, where of the last layer only keys and values are wanted."""
        x, last = self._before_last(x, view), self.layers[-1]
        last.attention.remember(last.input_norm(x, view.adapter), len(self.layers) - 1, view)

    def frequencies(self, length: int) -> mx.array | None:
        """Rotary frequencies of a sequence of ``length`` tokens, where the base alone does not say them."""
        return self.layers[0].attention.rotary.table(length)

    def _chunk(
        self, tokens: mx.array, cache: KVCache, total: int | None, ends: tuple[int, ...] | None = None
    ) -> CacheView:
        rows, length = tokens.shape
        return cache.chunk(rows, length, self.frequencies(max(cache.length + length, total or 0)), ends)

    def _before_last(self, x: mx.array, view: CacheView) -> mx.array:
        for index, layer in enumerate(self.layers[:-1]):
            x = layer(x, index, view)
        return x

    def head(self, hidden: mx.array, choice: AdapterChoice = None) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``[..., D]``, of rows whose adapters ``choice`` tells."""
        output = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        assert output is not None, "this machine does not hold the output head"
        return output(self.final_norm(hidden, choice), choice)

    def final_norm(self, hidden: mx.array, choice: AdapterChoice = None) -> mx.array:
        """Hidden states ``[..., D]`` as the output head takes them."""
        assert self.norm is not None, "this machine does not hold the final norm"
        return self.norm(hidden, choice)

    def __call__(self, tokens: mx.array, cache: KVCache | None = None) -> mx.array:
        """Lazy logits ``[B, L, V]`` of ``tokens [B, L]`` (int32), following what ``cache`` holds."""
        cache = self.make_cache() if cache is None else cache
        return self.head(self.hidden(tokens, cache), cache.adapter)

    @property
    def min_chunk_tokens(self) -> int:
        """Tokens of a row that come together at least when a prompt is cut; of a shorter prompt all.

        Fewer would be rounded in another way: as a decode step is, or, where keys and values have a few bits, as attention to
        these is.
        """
        return max(self.min_prompt_tokens, 1 if self.kv.bits in (None, 16) else PACKED_QUERIES + 1)

    @property
    def gathered(self) -> list[GatheredExperts]:
        """The experts of every layer; empty for a dense model."""
        return [layer.moe.experts for layer in self.layers if isinstance(layer.moe, SparseMoe)]

    @property
    def counters(self) -> Counters | None:
        """What streaming did so far; None for a dense model."""
        return self.gathered[0].counters if self.gathered else None

    @property
    def is_streamed(self) -> bool:
        """Whether a forward waits for the device in between, to know which experts to read."""
        return any(experts.pool is not None for experts in self.gathered)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they lie in memory; a bank that layers share counts once."""
        arrays = tree_flatten(self.parameters(), destination={})
        assert isinstance(arrays, dict)
        return sum(array.nbytes for array in {id(array): array for array in arrays.values()}.values())
