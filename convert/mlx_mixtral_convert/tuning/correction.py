"""A matrix changes, before it is packed, so that it makes up for what was lost before it.

What is missing of a layer's output ``y`` is regressed on the inputs ``x`` that the matrix meets in the packed model, and the
change is held near zero: of all ``C`` the one of least ``E ‖y - C x‖² + λ ‖C‖²``, which is ``E y x^T (E x x^T + λ)^-1``. The
text says how much to trust itself: λ is what serves best on sequences that the change was not computed from, and where none
helps there, nothing changes.

Wide matrices are corrected in blocks of columns, one after the other, each for what those before it leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.calibration.layer import times
from mlx_mixtral_convert.calibration.states import States
from mlx_mixtral_convert.tuning.trained import MIN_TOKENS, is_judge

__all__ = ["Met", "can_correct", "corrected"]

Floats = npt.NDArray[np.float32]
# λ, as shares of the mean square of the inputs.
PENALTIES = (10.0, 3.0, 1.0, 0.3)
# λ is chosen by about so many outputs, evenly spread: a solution for all 4,096 of 8x7B at each would take most of the time.
OUTPUTS = 512
ALL = slice(None)

# Of a block of columns: some tokens at a time, and the inputs ``[n, columns]`` they bring, as far as they reach the output.
Met = Callable[[slice], Iterable[tuple[npt.NDArray[np.int32], mx.array]]]


def can_correct(spec: QuantizationSpec | None) -> bool:
    """Whether what is written of a matrix is what it was corrected to: one that is not packed, or not in affine mode, comes as
    the source has it.
    """
    return spec is not None and spec.has_biases


def corrected(weights: Floats, blocks: Iterable[slice], met: Met, missing: States, *, apart: bool = False) -> mx.array:
    """``weights [rows, columns]``, changed in place.

    Args:
        missing: of the output, by token ``[rows]``; what is left of it afterwards.
        apart: the sequences that judge are to judge what is learned later, too. Otherwise the change is computed from all, once
            λ is known.
    """
    for block in blocks:
        change = _change(block, met, missing, len(weights), apart=apart)
        if change is None:
            continue
        weights[:, block] += change
        added = mx.array(change)
        for tokens, x in met(block):
            missing.add(tokens, -times(mx.contiguous(x), added))
    return mx.array(weights)


def _change(block: slice, met: Met, missing: States, rows: int, *, apart: bool) -> Floats | None:
    """What to add to a block, ``[rows, columns]``."""
    learned, judged = (_Sums(block.stop - block.start, rows) for _ in range(2))
    for tokens, x in met(block):
        judges = is_judge(tokens // missing.length)
        inputs, outputs = np.array(x), np.array(missing.take(tokens))
        learned.add(inputs[~judges], outputs[~judges])
        judged.add(inputs[judges], outputs[judges])
    if learned.count < MIN_TOKENS or not judged.count:
        return None
    some = slice(None, None, max(1, rows // OUTPUTS))
    gains = [judged.gain(learned.change(penalty, some), some) for penalty in PENALTIES]
    best = int(np.argmax(gains))
    if not gains[best] > 0:
        return None
    return (learned if apart else learned + judged).change(PENALTIES[best])


class _Sums:
    """Over tokens, ``x x^T`` and ``x y^T``."""

    def __init__(self, columns: int, rows: int) -> None:
        self.count = 0
        self.squares, self.products = np.zeros((columns, columns), np.float32), np.zeros((columns, rows), np.float32)

    def add(self, x: Floats, y: Floats) -> None:
        self.count += len(x)
        self.squares += x.T @ x
        self.products += x.T @ y

    def __add__(self, other: _Sums) -> _Sums:
        found = _Sums(*self.products.shape)
        found.count, found.squares = self.count + other.count, self.squares + other.squares
        found.products = self.products + other.products
        return found

    def change(self, penalty: float, outputs: slice = ALL) -> Floats:
        damped = self.squares.astype(np.float64)
        damped[np.diag_indices_from(damped)] += penalty * float(np.diagonal(self.squares).mean()) or 1.0
        return np.ascontiguousarray(np.linalg.solve(damped, self.products[:, outputs]).T, np.float32)

    def gain(self, change: Floats, outputs: slice) -> float:
        """By how much the squared error of some outputs falls with a change."""
        left = self.squares @ change.T
        left -= 2 * self.products[:, outputs]
        return -float(np.einsum("ij,ji->", left, change, dtype=np.float64))
