"""A layer's experts in unified memory, one expert a slot, and the two ways tokens meet them."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

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

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = _gate_and_up([projection(x) for projection in self.gate_up])
        return self.down(self._products.swiglu(gate, up, is_long=x.shape[-2] > 1))


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

    def __call__(self, x: mx.array, slots: mx.array, num_experts: int) -> mx.array:
        """Each token through each of its experts: ``x [B, L, D]``, ``slots [B, L, K]`` give ``[B, L, K, D]``."""
        per_token = slots.shape[-1]
        if not self.sorts(slots.shape, num_experts):
            return self._experts(x[..., None, None, :], slots, is_sorted=False).squeeze(-2)
        order = mx.argsort(slots.reshape(-1))  # [P]
        back = mx.argsort(order)
        tokens = token_rows(x, order // per_token)  # [P, 1, D]
        y = self.pairs(tokens, slots.reshape(-1)[order], is_sorted=True)  # [P, D]
        return y[back].reshape(*slots.shape, x.shape[-1])

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

    def pairs(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        """Row by row: ``x [P, 1, D]`` of ``token_rows`` through ``slots [P]`` gives ``[P, D]``.

        ``is_sorted`` promises that slots ascend.
        """
        return self._experts(x, slots, is_sorted=is_sorted).squeeze(-2)

    def inner(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        """What ``down`` is multiplied with: ``x [..., 1, D]`` gives ``[..., 1, F]``."""
        gate, up = _gate_and_up([projection(x, slots, is_sorted=is_sorted) for projection in self.gate_up])
        return self._products.swiglu(gate, up, is_long=is_sorted)

    def _experts(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        return self.down(self.inner(x, slots, is_sorted=is_sorted), slots, is_sorted=is_sorted)


def _gate_and_up(projected: list[mx.array]) -> tuple[mx.array, mx.array]:
    gate, up = projected if len(projected) == 2 else mx.split(projected[0], 2, axis=-1)
    return gate, up
