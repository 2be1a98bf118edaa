"""What a model's routers do, written down while it computes: experts in order of choice, and the gate's entropy.

L layers, K experts per token, E experts, n tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.model.moe import SparseMoe
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["Routed", "RoutingObserver", "ordered_choice", "record_routing"]


class Routed(NamedTuple):
    """``experts`` uint16 ``[n, L, K]``, first choice first, and the gate's ``entropy`` float32 ``[n, L]`` in bits."""

    experts: npt.NDArray[np.uint16]
    entropy: npt.NDArray[np.float32]


class RoutingObserver:
    """Watches the routers of ``module`` within a ``with`` block; ``take`` gives what they did since it was last called.

    Raises:
        InvalidRequestError: a dense model, which has no routers.
    """

    def __init__(self, module: MixtralModel) -> None:
        self._layers = [layer.moe for layer in module.layers if isinstance(layer.moe, SparseMoe)]
        if not self._layers:
            raise InvalidRequestError("this model is dense: it has no experts to choose from")
        self._seen: list[list[tuple[mx.array, mx.array]]] = [[] for _ in self._layers]

    def __enter__(self) -> Self:
        for moe, seen in zip(self._layers, self._seen, strict=True):
            moe.observe(self, functools.partial(_note, seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for moe, seen in zip(self._layers, self._seen, strict=True):
            moe.observe(self, None)
            seen.clear()

    def take(self) -> Routed:
        """Of calls that were evaluated: their tokens in order.

        Raises:
            CheckpointError: a router gives no numbers.
        """
        layers = []
        for seen in self._seen:
            layers.append([ordered_choice(*call) for call in seen])
            seen.clear()
        experts = np.stack([np.concatenate([part.experts for part in layer]) for layer in layers], axis=1)
        entropy = np.stack([np.concatenate([part.entropy for part in layer]) for layer in layers], axis=1)
        if not np.isfinite(entropy).all():
            layer = int(np.flatnonzero(~np.isfinite(entropy).all(axis=0))[0])
            raise CheckpointError(
                f"the router of layer {layer} returns values that are not numbers; the weights are damaged"
            )
        return Routed(experts, entropy)


def _note(seen: list[tuple[mx.array, mx.array]], selected_experts: mx.array, gate_logits: mx.array) -> None:
    seen.append((selected_experts, gate_logits))


def ordered_choice(selected_experts: mx.array, gate_logits: mx.array) -> Routed:
    """Of one layer: the experts it chose ``[n, K]``, largest logit first, equal ones by number, and entropy ``[n]``.

    The entropy is that of the softmax over all E experts, before it is cut to the chosen.
    """
    logits = np.array(gate_logits.astype(mx.float32)).reshape(-1, gate_logits.shape[-1])  # [n, E]
    chosen = np.sort(np.array(selected_experts).reshape(len(logits), -1), axis=-1)  # [n, K]
    order = np.argsort(-np.take_along_axis(logits, chosen, axis=-1), axis=-1, kind="stable")
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    # -sum p log p with log p = shifted - log(total); an expert of weight 0 adds nothing.
    nats = np.log(total) - (weights * np.where(weights > 0, shifted, 0)).sum(axis=-1) / total
    bits = np.maximum(nats / np.log(2), 0).astype(np.float32)
    return Routed(np.take_along_axis(chosen, order, axis=-1).astype(np.uint16), bits)


def record_routing(
    module: MixtralModel, compute: Callable[[Sequence[int]], object], texts: Sequence[Sequence[int]]
) -> RoutingTrace:
    """The choices for ``texts`` of token ids, each of which ``compute`` sends through ``module``.

    Raises:
        InvalidRequestError: no texts, a dense model, which has no routers, or one on several machines.
    """
    if module.link is not None:
        raise InvalidRequestError("a routing trace is recorded on one machine: load the model without group=")
    if not texts:
        raise InvalidRequestError("no texts were given; give at least one list of token ids")
    parts = []
    with RoutingObserver(module) as observer:
        for text in texts:
            compute(text)
            parts.append(observer.take().experts)
    starts = np.cumsum([0, *(len(text) for text in texts)])[:-1]
    return RoutingTrace(np.concatenate(parts), module.config.num_local_experts, tuple(int(at) for at in starts))
