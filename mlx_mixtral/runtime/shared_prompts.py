"""Keys and values of all layers of a model, wherever they lie: what a saved prompt holds."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.storage import LayerArrays
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["collect", "layer_count", "spread"]


def layer_count(model: MixtralModel) -> int:
    """Decoder layers of the model, those of other machines included."""
    return len(model.layers) if model.link is None else model.link.shares[-1].layers.stop


def collect(model: MixtralModel, cache: KVCache) -> list[LayerArrays]:
    """The layers of a cache, those of other machines included; of the leader. Others call it to give theirs."""
    link = model.link
    if link is None or link.share.split != "layers":
        return cache.layers
    found: list[LayerArrays] = []
    with link.order("collect", cache):
        for owner, layers in enumerate(share.layers for share in link.shares):
            for place in range(len(layers)):
                own = cache.layers[place] if owner == link.group.rank else cache.layers[0]
                arrays = []
                for array in own:
                    whole = link.group.from_rank(owner, array)
                    mx.eval(whole)
                    arrays.append(whole)
                found.append(tuple(arrays) if link.is_leader else ())
    return found


def spread(model: MixtralModel, cache: KVCache, layers: Sequence[LayerArrays] | None, tokens: int) -> None:
    """Put ``layers`` of ``tokens`` tokens into an empty cache, on every machine what it holds; the leader has them all."""
    link = model.link
    if link is None:
        assert layers is not None
        cache.adopt(layers, tokens)
        return
    own: list[LayerArrays] = []
    with link.order("spread", cache, tokens):
        empty = cache.storage.empty(1, tokens)
        mine = link.share.layers
        for layer in range(layer_count(model)):
            held = empty if layers is None else layers[layer]
            arrays = []
            for array in held:
                whole = link.group.from_rank(0, array)
                mx.eval(whole)
                arrays.append(whole)
            if link.share.split == "experts" or layer in mine:
                own.append(tuple(arrays))
        cache.adopt(own, tokens)
