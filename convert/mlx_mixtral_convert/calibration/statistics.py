"""What calibration gathers about the input of every matrix: mean squares, and for GPTQ second moments.

Matrices that share an input share its statistics: q, k and v; gate and up of one expert. An expert sees only the tokens routed
to it, each counted with the square of its routing weight, for that is how far an error of this expert reaches the output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix

__all__ = ["HESSIAN_COLUMNS", "InputSum", "hessian_blocks", "input_name"]

Floats = npt.NDArray[np.float32]
# Second moments are kept in blocks of at most this many columns: 8x7B's down matrices would need 0.8 GB per expert otherwise.
HESSIAN_COLUMNS = 1024
_SHARED = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def input_name(matrix: Matrix) -> str:
    """Path of the first matrix with the same input: statistics are kept under it."""
    head, _, name = matrix.path.rpartition(".")
    return f"{head}.{_SHARED.get(name, name)}" if head else matrix.path


def hessian_blocks(columns: int) -> list[slice]:
    """Runs of columns, each at most ``HESSIAN_COLUMNS`` and a multiple of 128 (the largest group) but perhaps the last."""
    count = -(-columns // HESSIAN_COLUMNS)
    step = -(-columns // count // 128) * 128
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]


@dataclass
class InputSum:
    """Sums over inputs ``x [N, columns]`` of one matrix: ``w x^2``, with ``full`` also ``w x x^T`` in blocks."""

    columns: int
    full: bool = False
    tokens: int = 0
    weight: float = 0.0
    squares: Floats = field(init=False)
    products: list[Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.squares = np.zeros(self.columns, np.float32)
        blocks = hessian_blocks(self.columns) if self.full else []
        self.products = [np.zeros((b.stop - b.start,) * 2, np.float32) for b in blocks]

    def add(self, x: mx.array, weights: mx.array | None = None) -> None:
        """Count ``x [..., columns]``, each row ``weights`` times (once when None)."""
        rows = np.array(x).reshape(-1, self.columns)
        if not len(rows):
            return
        if weights is not None:
            rows = rows * np.sqrt(np.array(weights))[:, None]
        self.tokens += len(rows)
        self.weight += float(np.array(weights).sum(dtype=np.float64)) if weights is not None else float(len(rows))
        self.squares += np.einsum("ij,ij->j", rows, rows)
        for block, product in zip(hessian_blocks(self.columns), self.products, strict=False):
            product += rows[:, block].T @ rows[:, block]

    @property
    def mean_squares(self) -> Floats:
        """Weighted mean of ``x^2``; zeros for an input no token reached."""
        return self.squares / np.float32(self.weight) if self.weight else self.squares

    @property
    def hessian(self) -> list[Floats]:
        return [product / np.float32(self.weight or 1.0) for product in self.products]
