"""Bytes that decoding one token has to read."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.layers.linear import Linear
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["TokenTraffic"]


class TokenTraffic:
    """Of one token of a batch of one: attention, routers, norms and the head, the experts it is routed to, keys and values,
    and what the adapter in use changes of all these.

    As they lie in memory, so in the compute type where that is not packed. An embedding table
    that is not the head too is not counted: a token reads one row of it.
    """

    def __init__(self, model: Mixtral) -> None:
        module, sizes = model.module, model.residency.sizes
        trunk = sizes.trunk_bytes - (0 if module.lm_head is None else _nbytes(module.embed_tokens))
        self.weight_bytes = trunk + sum(sizes.expert_bytes) * sizes.num_experts_per_tok + _adapter_bytes(module)
        cache = module.make_cache()
        cache.reserve(1, 1)
        self.kv_bytes_per_token = cache.nbytes // cache.capacity
        self._max_tokens = None if cache.window is None else cache.window.size

    def bytes_at(self, depth: int) -> int:
        """Bytes of a token with ``depth`` before it."""
        seen = depth if self._max_tokens is None else min(depth, self._max_tokens)
        return self.weight_bytes + self.kv_bytes_per_token * seen


def _adapter_bytes(module: MixtralModel) -> int:
    """What the adapter in use adds to the weights a token reads, its part of the embedding table left out as that is."""
    if (number := module.adapter) is None:
        return 0
    config, total = module.config, 0
    for each in module.modules():  # type: ignore[no-untyped-call]
        if isinstance(each, Linear) and each is not module.embed_tokens and (change := each.adapted.get(number)):
            total += sum(array.nbytes for array in change.arrays)
        elif isinstance(each, GatheredExperts) and (experts := each.adapted.get(number)):
            stacked = sum(array.nbytes for array in experts.arrays)
            total += stacked * config.num_experts_per_tok // config.num_local_experts
    return total


def _nbytes(matrix: Any) -> int:
    arrays = tree_flatten(matrix.parameters(), destination={})
    assert isinstance(arrays, dict)
    return sum(array.nbytes for array in arrays.values() if isinstance(array, mx.array))
