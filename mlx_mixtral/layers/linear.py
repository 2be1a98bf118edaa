"""Matrix products with weights that are quantised or not, alone or stacked by expert."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.config.quantization import QuantizationSpec

__all__ = ["Linear", "StackedLinear"]


class _Packed(NamedTuple):
    """What MLX's quantised operations take beside the packed weight, in their order."""

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str


class _Weights(Module):
    """Weight ``[..., out, in]``; when quantised, packed uint32 ``[..., out, in * bits / 32]`` with scales and biases.

    The arrays are allocated by the loader at their final size and filled in place, so that nothing is held twice.
    """

    def __init__(self, arrays: dict[str, mx.array], spec: QuantizationSpec | None) -> None:
        super().__init__()
        self.spec = spec
        self.weight = arrays["weight"]
        self.scales = arrays.get("scales")
        self.biases = arrays.get("biases")

    def _extra_repr(self) -> str:
        *lead, rows, columns = self.weight.shape
        inputs = columns if self.spec is None else columns * 32 // self.spec.bits
        packed = self.weight.dtype if self.spec is None else self.spec
        return f"{' x '.join(map(str, (*lead, rows, inputs)))}, {packed}"

    @property
    def _packed(self) -> _Packed:
        assert self.spec is not None
        assert self.scales is not None
        return _Packed(self.scales, self.biases, self.spec.group_size, self.spec.bits, self.spec.mode)


class Linear(_Weights):
    r"""``y = x W^T`` for ``x [..., in]``, giving ``[..., out]``; no bias, as nowhere in this family."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.spec is None:
            return x @ self.weight.T
        scales, biases, group_size, bits, mode = self._packed
        return mx.quantized_matmul(x, self.weight, scales, biases, True, group_size, bits, mode)

    def part(self, start: int, stop: int) -> Linear:
        """Its rows from ``start`` to ``stop`` as a matrix of their own: views, nothing is copied."""
        arrays = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        return Linear({name: array[start:stop] for name, array in arrays.items() if array is not None}, self.spec)

    def rows(self, indices: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows of the matrix, dequantised: an embedding look-up. ``indices [...]`` gives ``[..., in]``."""
        if self.spec is None:
            return self.weight[indices]
        scales, biases, group_size, bits, mode = self._packed
        picked = None if biases is None else biases[indices]
        return mx.dequantize(self.weight[indices], scales[indices], picked, group_size, bits, mode, dtype=dtype)


class StackedLinear(_Weights):
    r"""One matrix a slot, ``[S, out, in]``: ``y_p = x_p W_{slot(p)}^T`` for each token-slot pair."""

    def __call__(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        """Gather and multiply.

        Args:
            x: ``[..., 1, in]``, broadcast against ``slots [...]``.
            slots: int, which matrix each row of ``x`` meets.
            is_sorted: promise that ``slots`` ascends. On Metal a false promise gives wrong results, not an error.
        """
        # MLX's grouped kernel is for calls that leave the rows to it.
        rows = None if is_sorted else _every_row(x.shape[:-2])
        if self.spec is None:
            return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rows, slots, sorted_indices=is_sorted)
        scales, biases, group_size, bits, mode = self._packed
        return mx.gather_qmm(
            x,
            self.weight,
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


@lru_cache(maxsize=64)
def _every_row(shape: tuple[int, ...]) -> mx.array:
    """``0, 1, 2…`` in ``shape``: kept, where MLX would make it anew with a kernel for every product."""
    rows = mx.arange(prod(shape), dtype=mx.uint32).reshape(shape)
    mx.eval(rows)
    return rows
