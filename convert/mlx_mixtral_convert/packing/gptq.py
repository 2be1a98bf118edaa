"""Error compensation at the same format: what rounding one input loses, the inputs not yet rounded make up for.

For inputs ``x`` a matrix loses ``E ‖(W - Ŵ) x‖² = tr(R H R^T)`` with ``R = W - Ŵ`` and ``H = E x x^T``. GPTQ (arXiv 2210.17323)
rounds column by column and spreads each column's error over the later ones with the Cholesky factor of ``H^-1``; scale and
bias of a group are searched when its first column is reached, on weights that carry the errors so far. Coordinate descent then
revisits codes and group scales one at a time, each at its optimum given all the others, which never increases the loss
(QuantEase, arXiv 2309.01885).

In numpy, whose matrix products use the platform's BLAS. Wide matrices are treated in blocks of columns, and H is known within
blocks only: a 14336 x 14336 factorisation for each of 256 experts is more than a laptop should do. Rows do not depend on each
other and are treated as many at a time as a cache holds; a column asks for the errors of those before it when it is its turn,
so that nothing is written more than once.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.packing.codes import pack
from mlx_mixtral_convert.packing.search import search_groups

__all__ = ["gptq"]

Floats = npt.NDArray[np.float32]
# Of the mean second moment, added to the diagonal: an expert sees few tokens, and less would fit the text and not the model. On
# held-out text of the bundled checkpoint 0.1 loses 2 to 30% less than 0.01, by how many tokens each input has.
DAMPING = 0.1
SWEEPS = 3
ROWS = 2048


def gptq(weights: mx.array, spec: QuantizationSpec, hessian: list[Floats]) -> dict[str, mx.array]:
    """Pack ``weights [rows, columns]``; scales and biases are stored in their type.

    Args:
        hessian: ``H`` in blocks along the diagonal, whose sizes are multiples of the group size and add up to the columns.

    Returns:
        Evaluated ``weight`` (uint32), ``scales`` and ``biases``.
    """
    moments = [_Moments(block) for block in hessian]
    parts = []
    for row in range(0, len(weights), ROWS):
        values = np.array(weights[row : row + ROWS].astype(mx.float32))
        parts.append(_packed(values, moments, spec, weights.dtype))
    named = {
        field: mx.concatenate(list(arrays))
        for field, arrays in zip(("weight", "scales", "biases"), zip(*parts, strict=True), strict=True)
    }
    mx.eval(named)
    return named


def _packed(
    values: Floats, moments: list[_Moments], spec: QuantizationSpec, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Words, scales and biases of some rows, evaluated."""
    fields: list[tuple[Floats, Floats, Floats]] = []
    start = 0
    for each in moments:
        block = _Block(values[:, start : start + len(each.hessian)], each, spec, dtype)
        block.compensate()
        for _ in range(SWEEPS):
            block.refit_groups()
            block.refit_codes()
        fields.append((block.codes, block.scales, block.biases))
        start += len(each.hessian)
    codes, scales, biases = (mx.array(np.concatenate(field).T.copy()) for field in zip(*fields, strict=True))
    found = pack(codes, spec.bits), scales.astype(dtype), biases.astype(dtype)
    mx.eval(found)
    return found


class _Moments:
    """``H`` of a block of columns, damped, and the upper triangular U with ``H^-1 = U^T U``: row j says how the later columns
    make up for column j.
    """

    def __init__(self, hessian: Floats) -> None:
        damping = DAMPING * float(np.diagonal(hessian).mean()) or 1.0
        self.hessian = hessian + np.float32(damping) * np.eye(len(hessian), dtype=np.float32)
        inverse = np.linalg.inv(self.hessian.astype(np.float64))
        self.factor: Floats = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


class _Block:
    """Some rows of columns that share a Hessian block: target weights, the codes found, scale and bias a group.

    Everything lies with columns first, ``[columns, rows]``: a column is what is worked on.
    """

    def __init__(self, weights: Floats, moments: _Moments, spec: QuantizationSpec, dtype: mx.Dtype) -> None:
        self.weights, self.moments, self.spec, self.dtype = np.ascontiguousarray(weights.T), moments, spec, dtype
        self.top = np.float32(2**spec.bits - 1)
        columns, rows = self.weights.shape
        self.codes = np.zeros((columns, rows), np.float32)
        self.residual = self.weights.copy()  # W - Ŵ, once there are codes
        self.scales = np.zeros((columns // spec.group_size, rows), np.float32)
        self.biases = np.zeros_like(self.scales)

    def groups(self) -> Iterator[tuple[int, slice]]:
        size = self.spec.group_size
        return ((index, slice(index * size, (index + 1) * size)) for index in range(len(self.scales)))

    def rounded(self, values: Floats, group: int) -> Floats:
        """Nearest codes of one column ``[rows]`` of a group."""
        codes = values - self.biases[group]
        codes /= self.scales[group]
        np.rint(codes, out=codes)
        clipped: Floats = np.clip(codes, 0, self.top, out=codes)
        return clipped

    def compensate(self) -> None:
        """GPTQ's pass from the first column to the last."""
        factor = self.moments.factor
        errors = np.empty_like(self.weights)
        importance = mx.array(np.ascontiguousarray(np.diagonal(self.moments.hessian)))
        for group, columns in self.groups():
            start = columns.start
            values = self.weights[columns] - factor[:start, columns].T @ errors[:start]
            found = search_groups(mx.array(np.ascontiguousarray(values.T)), self.spec, importance[columns], self.dtype)
            self.scales[group] = np.array(found.scales)[:, 0]
            self.biases[group] = np.array(found.biases)[:, 0]
            within = np.ascontiguousarray(factor[columns, columns].T)
            for index, column in enumerate(range(start, columns.stop)):
                value = values[index] - within[index, :index] @ errors[start:column]
                codes = self.rounded(value, group)
                self.codes[column] = codes
                value -= codes * self.scales[group]
                value -= self.biases[group]
                value /= within[index, index]
                errors[column] = value
            self._restore(group, columns)

    def refit_codes(self) -> None:
        """Each code at its best given all others: ``w - ŵ_j`` moves by ``(R H)_j / H_jj`` before it is rounded."""
        hessian = self.moments.hessian
        moved = np.empty((self.spec.group_size, self.weights.shape[1]), np.float32)
        for group, columns in self.groups():
            gradient = hessian[columns] @ self.residual
            scales, biases, within = self.scales[group], self.biases[group], hessian[columns, columns]
            for index, column in enumerate(range(columns.start, columns.stop)):
                own = gradient[index] - within[index, :index] @ moved[:index]
                own /= within[index, index]
                old = self.codes[column] * scales
                own += old
                own += biases
                new = self.rounded(own, group)
                self.codes[column] = new
                np.subtract(new * scales, old, out=moved[index])
            self._restore(group, columns)

    def refit_groups(self) -> None:
        """Each group's scale and bias at their best given all codes; kept where the stored type's rounding leaves a gain."""
        hessian = self.moments.hessian
        for group, columns in self.groups():
            gradient = hessian[columns] @ self.residual
            within, codes = hessian[columns, columns], self.codes[columns]
            through = within @ codes
            a, b, c = np.einsum("ij,ij->j", through, codes), through.sum(axis=0), within.sum()
            u, v = np.einsum("ij,ij->j", gradient, codes), gradient.sum(axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                scales = self.stored(self.scales[group] + (c * u - b * v) / (a * c - b * b))
            moved = scales - self.scales[group]
            # The bias is fitted to the scale as it is stored.
            biases = self.stored(self.biases[group] + (v - b * moved) / c)
            shift = biases - self.biases[group]
            change = moved**2 * a + 2 * moved * shift * b + shift**2 * c - 2 * (moved * u + shift * v)
            better = np.isfinite(change) & (change < 0) & (scales != 0)
            self.scales[group] += np.where(better, moved, 0)
            self.biases[group] += np.where(better, shift, 0)
            self._restore(group, columns)

    def _restore(self, group: int, columns: slice) -> None:
        """The residual of a group whose codes, scale or bias changed."""
        restored = self.codes[columns] * self.scales[group]
        restored += self.biases[group]
        np.subtract(self.weights[columns], restored, out=self.residual[columns])

    def stored(self, values: Floats) -> Floats:
        return np.array(mx.array(values).astype(self.dtype).astype(mx.float32))
