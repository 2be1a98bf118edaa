"""What a reader found in an adapter's file: where the factors of every change lie, before any number is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["Change", "Contents", "Part", "whole"]


@dataclass(frozen=True)
class Part:
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
class Change:
    """The factors of ``LowRank``, still in the file; ``scale`` is the adapter's own."""

    a: Part
    """``[r, in]``."""
    b: Part
    """``[out, r]``."""
    scale: float
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None


Place = tuple[str, int | None]
"""Path of a matrix, and the expert, None where it has none."""


@dataclass(frozen=True)
class Contents:
    """All that a file changes of a model; ``notes`` say what is in it and of no consequence."""

    changes: Mapping[Place, Change] = field(default_factory=dict)
    replaced: Mapping[str, TensorInfo] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def whole(info: TensorInfo, *, transposed: bool = False) -> Part:
    """All of a tensor of two axes."""
    rows, columns = info.shape
    return Part(info, range(rows), range(columns), transposed)
