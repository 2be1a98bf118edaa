"""Matrix products with weights that are quantised or not, alone or stacked by expert, and who computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple, Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers.compiled import Compiled
from mlx_mixtral.layers.runs import by_runs

__all__ = ["MLX", "Linear", "Products", "StackedLinear", "Weights", "gathers_sorted"]


class PackedArrays(NamedTuple):
    """What MLX's quantised operations take beside the packed weight, in their order."""

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str


def gathers_sorted(pairs: int, num_experts: int) -> bool:
    """Whether GPUs are given ``pairs`` token-expert pairs sorted by expert.

    MLX's grouped Metal kernel, which reads each expert once instead of once a pair, applies from 16 pairs and 4 a matrix on
    (``GatherQMM::eval_gpu``). The rule asks the model's expert count, never the number of slots in memory: the path taken,
    and so the rounding, must not depend on how much memory the user granted.
    """
    return pairs >= 16 and pairs >= 4 * num_experts


class Products:
    """Who computes what takes a model's time: MLX's own kernels. ``layers.cpu`` has another for the CPU backend."""

    @property
    def description(self) -> str:
        """What computes, and on how many threads."""
        return "MLX's kernels"

    def buffer_bytes(self, largest: int) -> int:
        """Memory it keeps for itself, for matrices of at most ``largest`` numbers."""
        return 0

    @property
    def min_prompt_tokens(self) -> int:
        """The fewest tokens per row that are computed as part of a prompt: fewer would be rounded as a decode step is."""
        return 1

    def linear(self, x: mx.array, weights: Weights) -> mx.array:
        """``x W^T`` for ``x [..., in]``, ``[..., out]``."""
        if weights.spec is None:
            return x @ weights.weight.T
        scales, biases, group_size, bits, mode = weights.packed
        return mx.quantized_matmul(x, weights.weight, scales, biases, True, group_size, bits, mode)

    def gathered(self, x: mx.array, weights: Weights, slots: mx.array, *, is_sorted: bool) -> mx.array:
        """``x_p W_{slot(p)}^T``, arguments as of ``StackedLinear``."""
        # MLX's grouped kernel is for calls that leave the rows to it.
        rows = None if is_sorted else _every_row(x.shape[:-2])
        if weights.spec is None:
            return mx.gather_mm(x, weights.weight.swapaxes(-1, -2), rows, slots, sorted_indices=is_sorted)
        scales, biases, group_size, bits, mode = weights.packed
        return mx.gather_qmm(
            x,
            weights.weight,
            scales,
            biases,
            rows,
            slots,
            transpose=True,
            group_size=group_size,
            bits=bits,
            mode=mode,
            sorted_indices=is_sorted,
        )

    def low_rank(self, x: mx.array, y: mx.array, a: Weights, b: Weights) -> mx.array:
        """``y + (x A^T) B^T`` for ``x [..., in]``, ``y [..., out]``, ``A [r, in]`` and ``B [out, r]``: two kernels."""
        low = x @ a.weight.T
        rows = prod(x.shape[:-1])
        added = mx.addmm(y.reshape(rows, -1), low.reshape(rows, -1), b.weight.T)
        return added.reshape(y.shape)

    def weighted_sum(
        self, residual: mx.array, weights: mx.array, y: mx.array, change: mx.array | None = None
    ) -> mx.array:
        """``residual + sum_k weights_k (y_k + change_k)`` for ``y [B, L, K, D]``, ``weights [B, L, K]``: one kernel."""
        if change is not None:
            return _weighted_sum(residual, weights, y, change)
        return mx.addmm(residual[..., None, :], weights[..., None, :], y).squeeze(-2)

    def sorts(self, shape: tuple[int, ...], num_experts: int) -> bool:
        """Whether the token-expert pairs of a call, ``[B, L, K]``, are sorted by expert before they are gathered."""
        return gathers_sorted(prod(shape), num_experts)

    def swiglu(self, gate: mx.array, up: mx.array, *, is_long: bool, changes: Changes = (None, None)) -> mx.array:
        """``silu(gate) * up`` in one kernel; ``is_long`` says that the call it is part of has many rows.

        ``changes`` are added to either first, in the same kernel.
        """
        of_gate, of_up = changes
        if of_gate is None and of_up is None:
            return _swiglu(gate, up)
        if of_gate is None:
            return _swiglu_up(gate, up, of_up)
        return _swiglu_gate(gate, up, of_gate) if of_up is None else _swiglu_both(gate, up, of_gate, of_up)

    def attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        """``softmax(scale q k^T) v`` of ``queries [B, H, L, d]`` over ``[B, KV, T, d]``."""
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _summed(residual: mx.array, weights: mx.array, y: mx.array, change: mx.array) -> mx.array:
    # As the matrix product has it without changes: sums in float32, rounded once.
    total, shares = residual.astype(mx.float32), weights.astype(mx.float32)
    for k in range(y.shape[-2]):
        both = y[..., k, :].astype(mx.float32) + change[..., k, :].astype(mx.float32)
        total = total + shares[..., k : k + 1] * both
    return total.astype(residual.dtype)


_swiglu = Compiled(_gated, shapeless=True)
_swiglu_gate = Compiled(lambda gate, up, change: _gated(gate + change, up), shapeless=True)
_swiglu_up = Compiled(lambda gate, up, change: _gated(gate, up + change), shapeless=True)
_swiglu_both = Compiled(lambda gate, up, of_gate, of_up: _gated(gate + of_gate, up + of_up), shapeless=True)
_weighted_sum = Compiled(_summed)
Changes = tuple[mx.array | None, mx.array | None]
"""What is added to gate and to up, None for nothing."""
MLX = Products()


class Adapted(Protocol):
    """What an adapter makes of a matrix: see ``layers.adapted``."""

    @property
    def arrays(self) -> Iterator[mx.array]:
        """All arrays held."""
        ...

    def product(self, x: mx.array, y: mx.array, products: Products) -> mx.array:
        """What stands in place of the base's product ``y [..., out]`` of ``x [..., in]``."""
        ...

    def rows(self, indices: mx.array, y: mx.array) -> mx.array:
        """What stands in place of the base's rows ``y [..., in]``, which ``indices [...]`` name."""
        ...

    def part(self, start: int, stop: int) -> Adapted:
        """The same for the matrix' rows ``start`` to ``stop``."""
        ...


class Weights(Module):
    """Weight ``[..., out, in]``; when quantised, packed uint32 ``[..., out, in * bits / 32]`` with scales and biases.

    The arrays are allocated by the loader at their final size and filled in place, so that nothing is held twice.
    """

    def __init__(self, arrays: dict[str, mx.array], spec: QuantizationSpec | None, products: Products = MLX) -> None:
        super().__init__()
        self.spec = spec
        self.weight = arrays["weight"]
        self.scales = arrays.get("scales")
        self.biases = arrays.get("biases")
        self._products = products
        self._cut: Callable[[], list[Weights]] | None = None

    def rows_in(self, parts: int) -> list[Weights]:
        """The matrix cut into ``parts`` by its rows: views, made once."""
        if self._cut is None:
            out = self.weight.shape[-2]
            bounds = [out * index // parts for index in range(parts + 1)]
            pieces = [
                Weights({name: array[..., start:stop, :] for name, array in self.arrays.items()}, self.spec)
                for start, stop in pairwise(bounds)
            ]
            mx.eval([piece.arrays for piece in pieces])
            self._cut = lambda: pieces
        return self._cut()

    def _extra_repr(self) -> str:
        *lead, rows, columns = self.weight.shape
        inputs = columns if self.spec is None else columns * 32 // self.spec.bits
        packed = self.weight.dtype if self.spec is None else self.spec
        return f"{' x '.join(map(str, (*lead, rows, inputs)))}, {packed}"

    @property
    def packed(self) -> PackedArrays:
        assert self.spec is not None
        assert self.scales is not None
        return PackedArrays(self.scales, self.biases, self.spec.group_size, self.spec.bits, self.spec.mode)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """``weight``, and ``scales`` and ``biases`` where there are any."""
        named = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        return {name: array for name, array in named.items() if array is not None}


class Linear(Weights):
    r"""``y = x W^T`` for ``x [..., in]``, giving ``[..., out]``; no bias, as nowhere in this family.

    ``adapted`` is what adapters make of it, by their numbers; ``choice`` says which rows of ``x`` are whose.
    """

    def __init__(self, arrays: dict[str, mx.array], spec: QuantizationSpec | None, products: Products = MLX) -> None:
        super().__init__(arrays, spec, products)
        self._adapted: dict[int, Adapted] = {}

    @property
    def adapted(self) -> dict[int, Adapted]:
        return self._adapted

    def __call__(self, x: mx.array, choice: AdapterChoice = None) -> mx.array:
        y = self._products.linear(x, self)
        return by_runs(choice, self._adapted, y, lambda own, rows, part: own.product(x[rows], part, self._products))

    def part(self, start: int, stop: int) -> Linear:
        """Its rows from ``start`` to ``stop`` as a matrix of their own: views, nothing is copied."""
        part = Linear({name: array[start:stop] for name, array in self.arrays.items()}, self.spec, self._products)
        part.adapted.update({number: own.part(start, stop) for number, own in self._adapted.items()})
        return part

    def rows(self, indices: mx.array, dtype: mx.Dtype, choice: AdapterChoice = None) -> mx.array:
        """Rows of the matrix, dequantised: an embedding look-up. ``indices [...]`` gives ``[..., in]``."""
        y = self._rows(indices, dtype)
        return by_runs(choice, self._adapted, y, lambda own, rows, part: own.rows(indices[rows], part))

    def _rows(self, indices: mx.array, dtype: mx.Dtype) -> mx.array:
        if self.spec is None:
            return self.weight[indices]
        scales, biases, group_size, bits, mode = self.packed
        picked = None if biases is None else biases[indices]
        return mx.dequantize(self.weight[indices], scales[indices], picked, group_size, bits, mode, dtype=dtype)


class StackedLinear(Weights):
    r"""One matrix a slot, ``[S, out, in]``: ``y_p = x_p W_{slot(p)}^T`` for each token-slot pair."""

    def __call__(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        """Gather and multiply.

        Args:
            x: ``[..., 1, in]``, broadcast against ``slots [...]``.
            slots: int, which matrix each row of ``x`` meets.
            is_sorted: promise that ``slots`` ascends. On Metal a false promise gives wrong results, not an error.
        """
        return self._products.gathered(x, self, slots, is_sorted=is_sorted)


@lru_cache(maxsize=64)
def _every_row(shape: tuple[int, ...]) -> mx.array:
    """``0, 1, 2…`` in ``shape``: kept, where MLX would make it anew with a kernel for every product."""
    rows = mx.arange(prod(shape), dtype=mx.uint32).reshape(shape)
    mx.eval(rows)
    return rows
