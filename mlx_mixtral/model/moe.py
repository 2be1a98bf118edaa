"""The sparse mixture of experts: a router picks K experts for each token, the token's output is their weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.distributed.group import Group
from mlx_mixtral.experts.gather import GatheredExperts, Prefetch
from mlx_mixtral.layers.linear import Linear

__all__ = ["Ahead", "Observer", "SparseMoe", "route"]

Observer = Callable[[mx.array, mx.array], None]
"""Told the experts chosen ``[B, L, K]``, in no particular order, and the gate's logits ``[B, L, E]``, both lazy."""
Ahead = Callable[[mx.array, AdapterChoice], Prefetch | None]
"""From hidden states ``[B, L, D]`` before a layer's experts, and whose they are, to a guess at the next layer's experts; None
for no guess."""


def route(gate_logits: mx.array, num_experts_per_tok: int) -> tuple[mx.array, mx.array]:
    """Choose experts and their weights (arXiv 2401.04088, section 2.1).

    ``softmax(top_k(logits))``: the softmax over the chosen equals the softmax over all, cut to the chosen and renormalised.
    It is taken in float32 whatever the logits' type.

    Args:
        gate_logits: ``[..., E]``.

    Returns:
        ``selected_experts [..., K]`` uint32, in no particular order, and ``weights [..., K]`` that sum to 1.
    """
    num_experts = gate_logits.shape[-1]
    # The K largest end up behind position E - K: no negation of the logits is needed.
    first = num_experts - num_experts_per_tok
    selected_experts = mx.argpartition(gate_logits, kth=first, axis=-1)[..., first:]
    chosen = mx.take_along_axis(gate_logits, selected_experts, axis=-1)
    return selected_experts, mx.softmax(chosen, axis=-1, precise=True)


class SparseMoe(Module):
    r"""``y = sum_i softmax(top_k(x W_g))_i SwiGLU_i(x)``."""

    def __init__(self, gate: Linear, experts: GatheredExperts, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self._observers: dict[object, Observer] = {}
        self._ahead: Ahead | None = None
        self._group: Group | None = None

    def observe(self, owner: object, observer: Observer | None) -> None:
        """Tell ``observer`` what the router does in every call; None ends it."""
        self._observers.pop(owner, None)
        if observer is not None:
            self._observers[owner] = observer

    def share_with(self, group: Group) -> None:
        """Add up what several machines computed, each with a part of every expert's width."""
        self._group = group

    def prefetch_with(self, ahead: Ahead | None) -> None:
        """Let a streamed layer guess the experts of the next one, from the state that enters its own; None ends it."""
        self._ahead = ahead

    def __call__(self, x: mx.array, residual: mx.array, choice: AdapterChoice = None) -> mx.array:
        """``residual + y`` for ``x [B, L, D]``: the weighted sum and the residual are one kernel."""
        gate_logits = self.gate(x, choice)  # [B, L, E]
        selected_experts, weights = route(gate_logits, self.num_experts_per_tok)  # [B, L, K]
        for observer in self._observers.values():
            observer(selected_experts, gate_logits)
        ahead = self._ahead(residual, choice) if self._ahead is not None else None
        y, change = self.experts(x, selected_experts, self.num_experts, ahead, choice)  # [B, L, K, D]
        if self._group is None or self._group.is_leader:
            added = self.experts.products.weighted_sum(residual, weights, y, change)
        else:
            added = (weights[..., None, :] @ (y if change is None else y + change)).squeeze(-2)
        # The residual enters the sum once.
        return added if self._group is None else self._group.sum(added)
