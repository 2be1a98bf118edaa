"""What a reader found in an adapter's file: where the factors of every change lie, before any number is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["AdapterContents", "Factors", "TensorPart", "whole"]


@dataclass(frozen=True)
class TensorPart:
    """Some rows and columns of a tensor, its leading axes flattened, or their transpose."""

    info: TensorInfo
    rows: range
    columns: range
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shape = len(self.rows), len(self.columns)
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Factors:
    """The factors of ``LowRank``, still in the file; ``scale`` is the adapter's own."""

    a: TensorPart
    """``[r, in]``."""
    b: TensorPart
    """``[out, r]``."""
    scale: float
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None


MatrixPlace = tuple[str, int | None]
"""Path of a matrix, and the expert, None where it has none."""


@dataclass(frozen=True)
class AdapterContents:
    """All that a file changes of a model; ``notes`` say what is in it and of no consequence."""

    changes: Mapping[MatrixPlace, Factors] = field(default_factory=dict)
    replaced: Mapping[str, TensorInfo] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def whole(info: TensorInfo, *, transposed: bool = False) -> TensorPart:
    """All of a tensor of two axes."""
    rows, columns = info.shape
    return TensorPart(info, range(rows), range(columns), transposed)
