"""A layer's experts in unified memory, one expert a slot, and the two ways tokens meet them."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.layers.compiled import Compiled
from mlx_mixtral.layers.linear import Linear, StackedLinear

__all__ = ["ExpertBank", "FeedForward", "gathers_sorted", "swiglu", "token_rows"]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up`` in one kernel."""
    return _swiglu(gate, up)


_swiglu = Compiled[[mx.array, mx.array], mx.array](lambda gate, up: gate * mx.sigmoid(gate) * up, shapeless=True)


def gathers_sorted(pairs: int, num_experts: int) -> bool:
    """Whether ``pairs`` token-expert pairs are sorted by expert before they are gathered.

    MLX's grouped Metal kernel, which reads each expert once instead of once a pair, applies from 16 pairs and 4 a matrix on
    (``GatherQMM::eval_gpu``). The rule asks the model's expert count, never the number of slots in memory: the path taken,
    and so the rounding, must not depend on how much memory the user granted.
    """
    return pairs >= 16 and pairs >= 4 * num_experts


def token_rows(x: mx.array, tokens: mx.array) -> mx.array:
    """The rows ``tokens [P]`` of ``x [B, L, D]`` or ``[L, D]``, ``[P, 1, D]``.

    Gathered in that shape: MLX's grouped kernel takes the distance between rows from the axis of length 1, and one that was
    inserted into ``[P, D]`` afterwards has another stride (ml-explore/mlx issue 4253: wrong products on GPUs, no error).
    """
    return x.reshape(-1, x.shape[-1])[tokens[:, None]]


class FeedForward(Module):
    r"""SwiGLU network of a dense model: ``w2(silu(w1 x) * w3 x)``; ``gate_up`` as in ``ExpertBank``."""

    def __init__(self, gate_up: list[Linear], down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(_swiglu_of([projection(x) for projection in self.gate_up]))


class ExpertBank(Module):
    r"""SwiGLU experts of one layer: ``SwiGLU_i(x) = w2_i(silu(w1_i x) * w3_i x)`` (arXiv 2401.04088, section 2.1).

    ``gate_up`` is one stacked matrix ``[S, 2F, D]``, gate rows first, or two of ``[S, F, D]`` where the checkpoint packs
    them differently; ``down`` is ``[S, D, F]``.
    """

    def __init__(self, gate_up: list[StackedLinear], down: StackedLinear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: mx.array, slots: mx.array, num_experts: int) -> mx.array:
        """Each token through each of its experts: ``x [B, L, D]``, ``slots [B, L, K]`` give ``[B, L, K, D]``."""
        pairs, per_token = slots.size, slots.shape[-1]
        if not gathers_sorted(pairs, num_experts):
            return self._experts(x[..., None, None, :], slots, is_sorted=False).squeeze(-2)
        order = mx.argsort(slots.reshape(-1))  # [P]
        back = mx.argsort(order)
        tokens = token_rows(x, order // per_token)  # [P, 1, D]
        y = self.pairs(tokens, slots.reshape(-1)[order], is_sorted=True)  # [P, D]
        return y[back].reshape(*slots.shape, x.shape[-1])

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
        return _swiglu_of([projection(x, slots, is_sorted=is_sorted) for projection in self.gate_up])

    def _experts(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        return self.down(self.inner(x, slots, is_sorted=is_sorted), slots, is_sorted=is_sorted)


def _swiglu_of(projected: list[mx.array]) -> mx.array:
    gate, up = projected if len(projected) == 2 else mx.split(projected[0], 2, axis=-1)
    return swiglu(gate, up)
