"""Floats of 8 bits or whole bytes with a scale for the tensor, each row, each group of inputs or each block.

``weight`` F8_E4M3, F8_E5M2 or I8 ``[out, in]`` and ``weight_scale`` or ``weight_scale_inv``, which both mean
``w = (weight - zero) * scale``: a scalar, ``[out]``, ``[out, 1]``, ``[out, in / g]``, or one a block ``[out / r, in / c]``.
Scales of type U8 or F8_E8M0 are powers of two. Written by compressed-tensors (float-, int-, naive-quantized and
mxfp8-quantized), AutoFP8, FBGEMM, transformers (``fp8``, ``mxfp8``), DeepSeek's tools and ModelOpt.
https://github.com/vllm-project/compressed-tensors, https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral_convert.packing.measure import E4M3, E5M2, row_blocks
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.codecs.module import (
    POWERS,
    REQUANTISED,
    Codec,
    Floats,
    Module,
    affine_fields,
    affine_spec,
)

__all__ = ["ScaledCodec"]

_MXFP8 = QuantizationSpec(8, 32, "mxfp8")
_TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
_NAMES = {"F8_E4M3": "FP8 e4m3", "F8_E5M2": "FP8 e5m2", "I8": "int8"}
# Where the configuration does not say.
_BLOCKS = ((128, 128),)


class ScaledCodec(Codec):
    """``weight`` and its scales.

    Args:
        blocks: rows and columns of blocks that the configuration names.
        scales: the module that holds the scales, where it is another: transformers 5 saves experts apart, and their scales
            still stacked.
    """

    codes = "weight"
    fields = ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "pre_quant_scale")

    def __init__(
        self,
        module: Module,
        matrix: Matrix,
        blocks: Sequence[tuple[int, int]] = (),
        scales: Module | None = None,
    ) -> None:
        super().__init__(module, matrix)
        self.scaled = module if scales is None else scales
        module.expect("weight", ((module.height, matrix.in_features),), tuple(_NAMES))
        self.kind = module.dtype("weight")
        self.scale = "weight_scale_inv" if self.scaled.has("weight_scale_inv") else "weight_scale"
        self.rows, self.columns = self._steps(self.scale, blocks or _BLOCKS)
        self.scaled.expect(self.scale, (self.scaled.shape(self.scale),), (*FLOATS, *POWERS))
        if module.has("weight_zero_point"):
            module.expect("weight_zero_point", (module.shape("weight_zero_point"),), ("I8", "U8", "F8_E4M3", *FLOATS))
            if self._steps("weight_zero_point", blocks or _BLOCKS) != (self.rows, self.columns):
                raise module.wrong("weight_zero_point", f"{list(self.scaled.shape(self.scale))} was expected")
        if module.has("pre_quant_scale"):
            module.expect("pre_quant_scale", ((matrix.in_features,),), FLOATS)

    def _steps(self, field: str, blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """How many rows and columns share a scale."""
        height, width, shape = self.scaled.height, self.in_features, self.scaled.shape(field)
        if len(shape) == 4 and shape[1] == shape[3] == 1:
            shape = shape[0], shape[2]
        if shape in ((), (1,), (1, 1)):
            return height, width
        if shape in ((height,), (height, 1)):
            return 1, width
        for rows, columns in blocks:
            if shape == (-(-height // rows), -(-width // columns)):
                return rows, columns
        if len(shape) == 2 and shape[0] == height and shape[1] and width % shape[1] == 0:
            return 1, width // shape[1]
        sizes = " or ".join(f"{rows} by {columns}" for rows, columns in blocks)
        raise self.module.wrong(field, f"one number, or one per row, group of inputs or block of {sizes}, was expected")

    def decode(self, out: Floats) -> None:
        scales, zeros = self._scales, self._zeros
        earlier = self.module.floats("pre_quant_scale") if self.module.has("pre_quant_scale") else None
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                raw = self.module.array("weight", rows.start, rows.stop)
                own = (self.scaled.first + np.arange(rows.start, rows.stop)) // self.rows
                values = out[rows]
                values[:] = raw.view(np.int8) if self.kind == "I8" else _TABLES[self.kind][raw]
                if zeros is not None:
                    values -= self._spread(zeros[own])
                values *= self._spread(scales[own])
                if earlier is not None:
                    values *= earlier

    def packing(self) -> NativePacking:
        name = f"{_NAMES[self.kind]}, {self._shares}"
        plain = not self.module.has("pre_quant_scale")
        if plain and self.kind == "I8" and (spec := affine_spec(8, self.columns, self.in_features)) is not None:
            lossless = self._zeros is None and self.scaled.dtype(self.scale) == "F16"
            return NativePacking(spec, True, name, lossless)
        if plain and self.kind == "F8_E4M3" and self._zeros is None and self._fits_mxfp8:
            return NativePacking(_MXFP8, True, name, True)
        return NativePacking(REQUANTISED, False, name)

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        raw = self.module.array("weight", 0, self.out_features)
        own = (self.scaled.first + np.arange(self.out_features)) // self.rows
        spec = affine_spec(8, self.columns, self.in_features) if self.kind == "I8" else _MXFP8
        assert spec is not None

        def groups(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            count = min(self.columns, self.in_features) // spec.group_size
            return np.repeat(values[own], count, axis=1)[:, : self.in_features // spec.group_size]

        if spec == _MXFP8:
            return {"weight": np.ascontiguousarray(raw).view(np.uint32), "scales": groups(self._exponents)}
        zeros: Floats | float = 128.0 if self._zeros is None else groups(self._zeros) + np.float32(128)
        words = np.ascontiguousarray(raw ^ np.uint8(0x80)).view(np.uint32)
        return affine_fields(words, groups(self._scales), zeros, place)

    @property
    def _shares(self) -> str:
        """Who shares a scale, for reports."""
        if self.columns >= self.in_features:
            return "a scale a row" if self.rows == 1 else "one scale" if self.rows >= self.scaled.height else "blocks"
        return f"groups of {self.columns}" if self.rows == 1 else f"blocks of {self.rows} by {self.columns}"

    @property
    def _scales(self) -> Floats:
        """``[row steps, column steps]``."""
        return self._grid(self.scaled.scales(self.scale))

    @property
    def _zeros(self) -> Floats | None:
        """The same of zero points, None where all are 0."""
        if not self.module.has("weight_zero_point"):
            return None
        dtype = self.module.dtype("weight_zero_point")
        if dtype in FLOATS:
            values = self.module.floats("weight_zero_point")
        else:
            raw = np.atleast_1d(self.module.whole("weight_zero_point"))
            values = E4M3[raw] if dtype == "F8_E4M3" else raw.view(np.int8).astype(np.float32)
        return self._grid(values) if values.any() else None

    @property
    def _fits_mxfp8(self) -> bool:
        """Whether every group of 32 has one scale, and all are powers of two; where their type says so they are not read."""
        if self.in_features % 32 or (self.columns % 32 and self.columns < self.in_features):
            return False
        if self.scaled.dtype(self.scale) in POWERS:
            return True
        mantissas, exponents = np.frexp(self._scales)
        return bool((mantissas == 0.5).all() and exponents.min() >= -125 and exponents.max() <= 128)

    @property
    def _exponents(self) -> npt.NDArray[np.uint8]:
        """Such scales as MLX's bytes."""
        if self.scaled.dtype(self.scale) in POWERS:
            return np.asarray(self._grid(np.atleast_1d(self.scaled.whole(self.scale))), np.uint8)
        return np.asarray(np.frexp(self._scales)[1] + 126, np.uint8)

    def _grid(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.reshape(-(-self.scaled.height // self.rows), -1)

    def _spread(self, values: Floats) -> Floats:
        """A value for each column from those of a row's steps."""
        if self.columns >= self.in_features:
            return values
        return np.repeat(values, self.columns, axis=1)[:, : self.in_features]
