"""What reading gives and packing takes: float values, and how a source has packed them already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec

__all__ = ["NativePacking", "Values"]


@dataclass(frozen=True)
class Values:
    """Float values ``[rows, columns]`` as read: ``dtype`` is the safetensors name, BF16 is carried as uint16."""

    array: npt.NDArray[Any]
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(frozen=True)
class NativePacking:
    """What a matrix becomes when its source's packing is kept.

    Args:
        spec: the MLX packing that holds it.
        exact: whether the source's integers fit that packing as they are. False: the nearest packing, into which the
            dequantised values have to be rounded.
        type_name: the source's name for its type, as in ``Q4_K``, for messages and the report.
        lossless: with ``exact``, whether scales and biases fit float16 too, so that not one value changes.
    """

    spec: QuantizationSpec
    exact: bool
    type_name: str
    lossless: bool = False
