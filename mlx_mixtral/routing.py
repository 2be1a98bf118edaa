"""Which experts a model's routers choose, written down while it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.model.mixtral import MixtralModel
from mlx_mixtral.model.moe import SparseMoe

__all__ = ["record_routing"]


def record_routing(
    module: MixtralModel, compute: Callable[[Sequence[int]], object], texts: Sequence[Sequence[int]]
) -> RoutingTrace:
    """The choices for ``texts`` of token ids, each of which ``compute`` sends through ``module``.

    Raises:
        InvalidRequestError: a dense model, which has no routers.
    """
    layers = [layer.moe for layer in module.layers if isinstance(layer.moe, SparseMoe)]
    if not layers:
        raise InvalidRequestError("this model is dense: it has no experts to choose from")
    parts: list[list[npt.NDArray[np.uint16]]] = [[] for _ in layers]
    observer = object()

    def record(chosen: mx.array, into: list[npt.NDArray[np.uint16]]) -> None:
        into.append(np.asarray(chosen).reshape(-1, chosen.shape[-1]).astype(np.uint16))

    for moe, part in zip(layers, parts, strict=True):
        moe.observe(observer, functools.partial(record, into=part))
    try:
        for text in texts:
            compute(text)
    finally:
        for moe in layers:
            moe.observe(observer, None)
    starts = np.cumsum([0, *(len(text) for text in texts)])[:-1]
    experts = np.stack([np.concatenate(part) for part in parts], axis=1)
    return RoutingTrace(experts, module.config.num_local_experts, tuple(int(at) for at in starts))
