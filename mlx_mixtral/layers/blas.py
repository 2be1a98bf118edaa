"""Matrices as float32, whatever they are packed as, and products by numpy's BLAS whose rows do not depend on each other."""

from __future__ import annotations

import threading
from functools import cache
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers.linear import Weights
from mlx_mixtral.weights.dtypes import MLX_DTYPES, NUMPY_DTYPES, bytes_of, convert

__all__ = ["BLOCK", "FloatMatrix", "Floats", "matrix_of", "product", "write_product"]

# Numbers a thread unpacks before it multiplies by them, and in one go: both stay in a core's cache.
BLOCK, PIECE = 2**20, 2**18
# OpenBLAS has kernels of their own for up to a million multiplications.
SMALL_WORK = 2**20
# So many rows are rounded alike by OpenBLAS's kernels for any processor.
SAME_ROWS = 8

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
_own = threading.local()
Floats = npt.NDArray[np.float32]


class FloatMatrix:
    """The rows of a matrix, in slot ``slot`` of stacked ones, as float32.

    Their columns come in whatever order is quickest, perhaps with more behind them; ``arranged`` brings ``x`` to match.
    """

    def __init__(self, weights: Weights, slot: int | None) -> None:
        held = {name: _memory(array) for name, array in weights.arrays.items()}
        self.raw = held if slot is None else {name: memory[slot] for name, memory in held.items()}
        self.kinds = {name: _NAMES[array.dtype] for name, array in weights.arrays.items()}

    @property
    def plain(self) -> Floats | None:
        """The matrix itself, where that is float32."""
        return self.raw["weight"] if self.kinds["weight"] == "F32" else None

    def arranged(self, x: Floats) -> Floats:
        return x

    def unpack(self, rows: slice, out: Floats) -> None:
        out[:] = self._floats("weight", rows)

    def _floats(self, name: str, rows: slice) -> Floats:
        floats: Floats = convert(self.raw[name][rows], self.kinds[name], "F32")
        return floats


class _Packed(FloatMatrix):
    """Codes of ``bits`` bits, each row's a stream of bits, lowest first; groups of them share a scale.

    The pattern of bits repeats after ``count`` codes: every ``count``-th code is a plane, and planes lie one behind the
    other, so that numpy's loops run over long contiguous rows. A group's bias is a column behind them, which meets the sum of
    the group's ``x``: a pass over all numbers less. It is that of codes that go both ways from zero, so that nothing cancels.
    """

    def __init__(self, weights: Weights, slot: int | None, spec: QuantizationSpec) -> None:
        super().__init__(weights, slot)
        self.bits = spec.bits
        self.period, self.count = spec.bits // gcd(spec.bits, 8), 8 // gcd(spec.bits, 8)
        self.group_size = spec.group_size
        self.tables = None if spec.mode == "affine" else _tables(spec)

    def arranged(self, x: Floats) -> Floats:
        rows, columns = x.shape
        groups = 0 if self.tables else columns // self.group_size
        arranged = np.empty((rows, columns + groups), np.float32)
        arranged[:, :columns].reshape(rows, self.count, -1)[:] = x.reshape(rows, -1, self.count).swapaxes(1, 2)
        if groups:
            np.sum(x.reshape(rows, groups, -1), axis=-1, out=arranged[:, columns:])
        return arranged

    def unpack(self, rows: slice, out: Floats) -> None:
        stream = self.raw["weight"][rows].view(np.uint8).reshape(len(out), -1, self.period)
        columns = stream.shape[1] * self.count
        values = out[:, :columns].reshape(len(out), self.count, -1)
        mask, middle = np.uint8(2**self.bits - 1), np.uint8(2 ** (self.bits - 1))
        for plane in range(self.count):
            byte, shift = divmod(plane * self.bits, 8)
            codes = stream[:, :, byte]
            if shift:
                codes = codes >> np.uint8(shift)
            if shift + self.bits > 8:
                codes |= stream[:, :, byte + 1] << np.uint8(8 - shift)
            if shift + self.bits != 8:
                codes = codes & mask
            values[:, plane] = (codes - middle).view(np.int8) if self.tables is None else self.tables[0][codes]
        # Weights that are not finite give logits that are not, which is for others to say.
        with np.errstate(all="ignore"):
            if self.tables is None:
                scales = self._floats("scales", rows)
                values *= self._by_column(scales)
                np.add(self._floats("biases", rows), scales * np.float32(middle), out=out[:, columns:])
            else:
                values *= self._by_column(self.tables[1][self.raw["scales"][rows]])

    def _by_column(self, groups: Floats) -> Floats:
        """A number a group, for every column of a plane."""
        return np.repeat(groups, self.group_size // self.count, axis=1)[:, None]


def matrix_of(weights: Weights, slot: int | None = None) -> FloatMatrix:
    """A matrix to multiply by; what MLX has still to compute of it is computed now, on this thread."""
    return FloatMatrix(weights, slot) if weights.spec is None else _Packed(weights, slot, weights.spec)


def write_product(x: Floats, matrix: FloatMatrix, rows: slice, out: Floats) -> None:
    """``out = x W^T`` for some of the rows of ``W``, at most ``BLOCK`` numbers of them; ``x`` is arranged."""
    if matrix.plain is not None:
        product(x, matrix.plain[rows].T, out)
        return
    columns, piece = x.shape[1], max(1, PIECE // x.shape[1])
    block = _buffer(out.shape[1] * columns).reshape(-1, columns)
    for start in range(0, len(block), piece):
        part = block[start : start + piece]
        matrix.unpack(slice(rows.start + start, rows.start + start + len(part)), part)
    product(x, block.T, out)


def product(x: Floats, matrix: Floats, out: Floats) -> None:
    """``out = x matrix``, of which no row depends on how many others there are, or on where it stands among them.

    With rows of zeros where it is a vector's product or a small one, which BLAS rounds otherwise; and few rows at a time where
    its kernels round the rows of a larger product in more than one way.
    """
    step = len(x) if rows_agree() else SAME_ROWS
    least = max(2, SMALL_WORK // matrix.size + 1) if rows_agree() else SAME_ROWS
    with np.errstate(all="ignore"):
        for start in range(0, len(x), step):
            part = x[start : start + step]
            if len(part) >= least:
                np.matmul(part, matrix, out=out[start : start + step])
            else:
                padded = np.zeros((least, x.shape[1]), np.float32)
                padded[: len(part)] = part
                out[start : start + step] = np.matmul(padded, matrix)[: len(part)]


@cache
def rows_agree() -> bool:
    """Whether BLAS gives equal rows of a product equal bits, whatever their number.

    OpenBLAS does with AVX-512, and does not with AVX2.
    """
    generator = np.random.default_rng(0)
    row, matrix = (generator.standard_normal(shape, np.float32) for shape in ((1, 256), (256, 1000)))
    products = [np.repeat(row, count, axis=0) @ matrix for count in (SAME_ROWS, 12, 67, 510)]
    return all(bool((rows == products[0][0]).all()) for rows in products)


@cache
def _tables(spec: QuantizationSpec) -> tuple[Floats, Floats]:
    """What every code and every scale of a floating-point mode means, as MLX has it."""
    one_scale, one_code = (56 if spec.mode == "nvfp4" else 127), (56 if spec.bits == 8 else 2)

    def meaning(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> Floats:
        """Of codes, each in a row and group of its own."""
        octets = codes if spec.bits == 8 else codes | codes << 4
        packed = np.repeat(octets[:, None], spec.group_size * spec.bits // 8, axis=1).view(np.uint32)
        words, groups = mx.array(packed), mx.array(scales[:, None])
        values = mx.dequantize(words, groups, None, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)
        return np.array(values)[:, 0]

    codes = np.arange(2**spec.bits, dtype=np.uint8)
    scales = np.arange(256, dtype=np.uint8)
    return meaning(codes, np.full_like(codes, one_scale)), meaning(np.full_like(scales, one_code), scales)


def _memory(array: mx.array) -> npt.NDArray[Any]:
    """An array as numpy has its type: bfloat16 as uint16."""
    return bytes_of(array).view(NUMPY_DTYPES[_NAMES[array.dtype]]).reshape(array.shape)


def _buffer(size: int) -> Floats:
    """Memory of this thread's own, kept for the next product."""
    if not hasattr(_own, "buffer") or _own.buffer.size < size:
        _own.buffer = np.empty(size, np.float32)
    buffer: Floats = _own.buffer
    return buffer[:size]
