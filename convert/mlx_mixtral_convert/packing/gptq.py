"""Error compensation at the same format: what rounding one input loses, the inputs not yet rounded make up for.

For inputs ``x`` a matrix loses ``E ‖(W - Ŵ) x‖² = tr(R H R^T)`` with ``R = W - Ŵ`` and ``H = E x x^T``. GPTQ (arXiv 2210.17323)
rounds column by column and spreads each column's error over the later ones with the Cholesky factor of ``H^-1``; scale and
bias of a group are searched when its first column is reached, on weights that carry the errors so far. Coordinate descent then
revisits codes and group scales one at a time, each at its optimum given all the others, which never increases the loss
(QuantEase, arXiv 2309.01885).

In numpy, whose matrix products use the platform's BLAS. Wide matrices are treated in blocks of columns, and H is known within
blocks only: a 14336 x 14336 factorisation for each of 256 experts is more than a laptop should do.
"""

from __future__ import annotations

from typing import Any

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


def gptq(weights: mx.array, spec: QuantizationSpec, hessian: list[Floats]) -> dict[str, mx.array]:
    """Pack ``weights [rows, columns]``; scales and biases are stored in their type.

    Args:
        hessian: ``H`` in blocks along the diagonal, whose sizes are multiples of the group size and add up to the columns.

    Returns:
        Evaluated ``weight`` (uint32), ``scales`` and ``biases``.
    """
    values = np.array(weights.astype(mx.float32))
    fields: list[tuple[Floats, Floats, Floats]] = []
    start = 0
    for block in hessian:
        part = _Block(values[:, start : start + len(block)], block, spec, weights.dtype)
        part.compensate()
        for _ in range(SWEEPS):
            part.refit_groups()
            part.refit_codes()
        fields.append((part.codes, part.scales, part.biases))
        start += len(block)
    codes, scales, biases = (np.concatenate(field, axis=1) for field in zip(*fields, strict=True))
    named = {
        "weight": pack(mx.array(codes), spec.bits),
        "scales": mx.array(scales).astype(weights.dtype),
        "biases": mx.array(biases).astype(weights.dtype),
    }
    mx.eval(named)
    return named


class _Block:
    """Columns that share a Hessian block: target weights, the codes found, scale and bias a group."""

    def __init__(self, weights: Floats, hessian: Floats, spec: QuantizationSpec, dtype: mx.Dtype) -> None:
        self.weights, self.spec, self.dtype = weights, spec, dtype
        diagonal = np.diagonal(hessian)
        damping = DAMPING * float(diagonal.mean()) or 1.0
        self.hessian = hessian + np.float32(damping) * np.eye(len(hessian), dtype=np.float32)
        self.top = np.float32(2**spec.bits - 1)
        rows, columns = weights.shape
        # Columns are contiguous: they are what is worked on.
        self.codes = np.zeros(weights.shape, np.float32, order="F")
        self.scales = np.zeros((rows, columns // spec.group_size), np.float32)
        self.biases = np.zeros_like(self.scales)

    def groups(self) -> Any:
        size = self.spec.group_size
        return ((index, slice(index * size, (index + 1) * size)) for index in range(self.scales.shape[1]))

    def rounded(self, values: Floats, group: int) -> Floats:
        """Nearest codes of one column ``[rows]`` of a group."""
        codes = np.rint((values - self.biases[:, group]) / self.scales[:, group])
        clipped: Floats = np.clip(codes, 0, self.top)
        return clipped

    def compensate(self) -> None:
        """GPTQ's pass from the first column to the last."""
        values = np.asfortranarray(self.weights.copy())
        # Upper triangular U with H^-1 = U^T U: row j says how the later columns make up for column j.
        inverse = np.linalg.inv(self.hessian.astype(np.float64))
        factor = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
        importance = mx.array(np.ascontiguousarray(np.diagonal(self.hessian)))
        for group, columns in self.groups():
            found = search_groups(mx.array(values[:, columns]), self.spec, importance[columns], self.dtype)
            self.scales[:, group] = np.array(found.scales)[:, 0]
            self.biases[:, group] = np.array(found.biases)[:, 0]
            errors = np.empty_like(values[:, columns])
            for index, column in enumerate(range(columns.start, columns.stop)):
                codes = self.rounded(values[:, column], group)
                self.codes[:, column] = codes
                restored = codes * self.scales[:, group] + self.biases[:, group]
                errors[:, index] = (values[:, column] - restored) / factor[column, column]
                later = slice(column + 1, columns.stop)
                values[:, later] -= errors[:, index, None] * factor[column, later]
            values[:, columns.stop :] -= errors @ factor[columns, columns.stop :]

    def restored(self) -> Floats:
        size = self.spec.group_size
        values: Floats = self.codes * np.repeat(self.scales, size, axis=1) + np.repeat(self.biases, size, axis=1)
        return values

    def refit_codes(self) -> None:
        """Each code at its best given all others: ``w - ŵ_j`` moves by ``(R H)_j / H_jj`` before it is rounded."""
        gradient = (self.weights - self.restored()) @ self.hessian
        for group, columns in self.groups():
            scales, biases = self.scales[:, group], self.biases[:, group]
            local = np.asfortranarray(gradient[:, columns])
            moved = np.empty_like(local)
            within = self.hessian[columns, columns]
            for index, column in enumerate(range(columns.start, columns.stop)):
                old = self.codes[:, column]
                target = old * scales + biases + local[:, index] / within[index, index]
                new = self.rounded(target, group)
                moved[:, index] = (new - old) * scales
                self.codes[:, column] = new
                local[:, index + 1 :] -= moved[:, index, None] * within[index, index + 1 :]
            gradient -= moved @ self.hessian[columns]

    def refit_groups(self) -> None:
        """Each group's scale and bias at their best given all codes; kept where the stored type's rounding leaves a gain."""
        gradient = (self.weights - self.restored()) @ self.hessian
        for group, columns in self.groups():
            within, codes = self.hessian[columns, columns], self.codes[:, columns]
            ones = within.sum(axis=1)
            through = codes @ within
            a, b, c = (through * codes).sum(axis=1), through.sum(axis=1), ones.sum()
            u, v = (gradient[:, columns] * codes).sum(axis=1), gradient[:, columns].sum(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                scales = self.stored(self.scales[:, group] + (c * u - b * v) / (a * c - b * b))
            moved = scales - self.scales[:, group]
            # The bias is fitted to the scale as it is stored.
            biases = self.stored(self.biases[:, group] + (v - b * moved) / c)
            shift = biases - self.biases[:, group]
            change = moved**2 * a + 2 * moved * shift * b + shift**2 * c - 2 * (moved * u + shift * v)
            better = np.isfinite(change) & (change < 0) & (scales != 0)
            moved, shift = np.where(better, moved, 0), np.where(better, shift, 0)
            self.scales[:, group] += moved
            self.biases[:, group] += shift
            gradient -= (codes * moved[:, None] + shift[:, None]) @ self.hessian[columns]

    def stored(self, values: Floats) -> Floats:
        return np.array(mx.array(values).astype(self.dtype).astype(mx.float32))
