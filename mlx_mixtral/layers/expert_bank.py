"""A layer's experts in unified memory, one expert a slot, and the two ways tokens meet them."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.layers.adapted_experts import ExpertChanges, PairChanges, changes_of_rows, changes_of_sorted
from mlx_mixtral.layers.linear import MLX, Linear, Products, StackedLinear

__all__ = ["ExpertBank", "FeedForward", "swiglu", "token_rows"]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up`` in one kernel."""
    return MLX.swiglu(gate, up, is_long=False)


def token_rows(x: mx.array, tokens: mx.array) -> mx.array:
    """The rows ``tokens [P]`` of ``x [B, L, D]`` or ``[L, D]``, ``[P, 1, D]``.

    Gathered in that shape: MLX's grouped kernel takes the distance between rows from the axis of length 1, and one that was
    inserted into ``[P, D]`` afterwards has another stride (ml-explore/mlx issue 4253: wrong products on GPUs, no error).
    """
    return x.reshape(-1, x.shape[-1])[tokens[:, None]]


class FeedForward(Module):
    r"""SwiGLU network of a dense model: ``w2(silu(w1 x) * w3 x)``; ``gate_up`` as in ``ExpertBank``."""

    def __init__(self, gate_up: list[Linear], down: Linear, products: Products = MLX) -> None:
        super().__init__()
        self._products = products
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: mx.array, choice: AdapterChoice = None) -> mx.array:
        gate, up = _gate_and_up([projection(x, choice) for projection in self.gate_up])
        return self.down(self._products.swiglu(gate, up, is_long=x.shape[-2] > 1), choice)


class ExpertBank(Module):
    r"""SwiGLU experts of one layer: ``SwiGLU_i(x) = w2_i(silu(w1_i x) * w3_i x)`` (arXiv 2401.04088, section 2.1).

    ``gate_up`` is one stacked matrix ``[S, 2F, D]``, gate rows first, or two of ``[S, F, D]`` where the checkpoint packs
    them differently; ``down`` is ``[S, D, F]``.
    """

    def __init__(self, gate_up: list[StackedLinear], down: StackedLinear, products: Products = MLX) -> None:
        super().__init__()
        self._products = products
        self.gate_up = gate_up
        self.down = down

    @property
    def products(self) -> Products:
        """Who multiplies."""
        return self._products

    def __call__(self, x: mx.array, slots: mx.array, num_experts: int) -> mx.array:
        """Each token through each of its experts: ``x [B, L, D]``, ``slots [B, L, K]`` give ``[B, L, K, D]``."""
        return self.outputs(x, slots, num_experts, None, {})[0]

    def outputs(
        self,
        x: mx.array,
        slots: mx.array,
        num_experts: int,
        choice: AdapterChoice,
        adapted: Mapping[int, ExpertChanges],
    ) -> tuple[mx.array, mx.array | None]:
        """As a call of a bank whose slots are the experts, and what adapters add to it; None where they add nothing."""
        per_token = slots.shape[-1]
        if not self.sorts(slots.shape, num_experts):
            changes = changes_of_rows(choice, adapted, slots)
            return self._experts(x[..., None, None, :], slots, changes, is_sorted=False)
        order = mx.argsort(slots.reshape(-1))  # [P]
        back = mx.argsort(order)
        tokens = token_rows(x, order // per_token)  # [P, 1, D]
        changes = changes_of_sorted(choice, adapted, slots, order, back)
        y, change = self.pairs(tokens, slots.reshape(-1)[order], changes, is_sorted=True)  # [P, D]
        shape = (*slots.shape, x.shape[-1])
        return y[back].reshape(shape), None if change is None else change[back].reshape(shape)

    def sorts(self, shape: tuple[int, ...], num_experts: int) -> bool:
        """Whether the pairs ``[B, L, K]`` of a whole call are sorted by expert: the same however many slots there are."""
        return self._products.sorts(shape, num_experts)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All arrays ``[S, rows, columns]``, by names such as ``gate_up.0.weight``."""
        named = {f"gate_up.{index}": matrix for index, matrix in enumerate(self.gate_up)} | {"down": self.down}
        fields = ("weight", "scales", "biases")
        return {
            f"{name}.{field}": array
            for name, matrix in named.items()
            for field in fields
            if (array := getattr(matrix, field)) is not None
        }

    def pairs(
        self, x: mx.array, slots: mx.array, changes: PairChanges | None = None, *, is_sorted: bool
    ) -> tuple[mx.array, mx.array | None]:
        """Row by row: ``x [P, 1, D]`` of ``token_rows`` through ``slots [P]`` gives ``[P, D]``, and what adapters add to it.

        ``is_sorted`` promises that slots ascend.
        """
        return self._experts(x, slots, changes, is_sorted=is_sorted)

    def inner(self, x: mx.array, slots: mx.array, changes: PairChanges | None = None, *, is_sorted: bool) -> mx.array:
        """What ``down`` is multiplied with: ``x [..., 1, D]`` gives ``[..., 1, F]``."""
        gate, up = _gate_and_up([projection(x, slots, is_sorted=is_sorted) for projection in self.gate_up])
        if changes is None:
            return self._products.swiglu(gate, up, is_long=is_sorted)
        width = gate.shape[-1]
        both = changes.change("gate", x, width), changes.change("up", x, width)
        return self._products.swiglu(gate, up, is_long=is_sorted, changes=both)

    def outer(
        self, inner: mx.array, slots: mx.array, changes: PairChanges | None = None, *, is_sorted: bool
    ) -> tuple[mx.array, mx.array | None]:
        """``inner [..., 1, F]`` through ``down``: ``[..., D]``, and what adapters add to it."""
        y = self.down(inner, slots, is_sorted=is_sorted)
        change = None if changes is None else changes.change("down", inner, y.shape[-1])
        return y.squeeze(-2), None if change is None else change.squeeze(-2)

    def _experts(
        self, x: mx.array, slots: mx.array, changes: PairChanges | None, *, is_sorted: bool
    ) -> tuple[mx.array, mx.array | None]:
        inner = self.inner(x, slots, changes, is_sorted=is_sorted)
        return self.outer(inner, slots, changes, is_sorted=is_sorted)


def _gate_and_up(projected: list[mx.array]) -> tuple[mx.array, mx.array]:
    gate, up = projected if len(projected) == 2 else mx.split(projected[0], 2, axis=-1)
    return gate, up
