"""Integers of 4 bits, two rows to a byte: ModelOpt's ``W4A16_AWQ``.

``weight`` U8 ``[out / 2, in]``: signed numbers, those of even rows in the low bits, of odd ones in the high bits.
``weight_scale`` ``[out, in / g]``; ``pre_quant_scale`` ``[in]`` where the input is scaled before. https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral_convert.packing.codes import pack_rows
from mlx_mixtral_convert.packing.measure import row_blocks
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.codecs.module import (
    REQUANTISED,
    Codec,
    Floats,
    Module,
    affine_fields,
    affine_spec,
)

__all__ = ["RowPairCodec"]


class RowPairCodec(Codec):
    """``weight`` with half as many rows as the matrix."""

    codes = "weight"
    fields = ("weight", "weight_scale", "pre_quant_scale")

    def __init__(self, module: Module, matrix: Matrix) -> None:
        super().__init__(module, matrix)
        module.expect("weight", ((module.height // 2, matrix.in_features),), ("U8",))
        shape = module.shape("weight_scale")
        if len(shape) != 2 or shape[0] != module.height or not shape[1] or matrix.in_features % shape[1]:
            raise module.wrong("weight_scale", "one per row and group of inputs was expected")
        module.expect("weight_scale", (shape,), FLOATS)
        self.group = matrix.in_features // shape[1]
        if module.has("pre_quant_scale"):
            module.expect("pre_quant_scale", ((matrix.in_features,),), FLOATS)

    def decode(self, out: Floats) -> None:
        scales = self._scales()
        earlier = self.module.floats("pre_quant_scale") if self.module.has("pre_quant_scale") else None
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                values = out[rows].reshape(rows.stop - rows.start, -1, self.group)
                values[:] = self._codes(rows.start, rows.stop).reshape(values.shape)
                values -= 8
                values *= scales[rows, :, None]
                if earlier is not None:
                    out[rows] *= earlier

    def packing(self) -> NativePacking:
        name, spec = f"int4 g{self.group}", affine_spec(4, self.group, self.in_features)
        if spec is None or self.module.has("pre_quant_scale"):
            return NativePacking(REQUANTISED, False, name if spec is None else f"{name} with scaled inputs")
        return NativePacking(spec, True, name, self.module.dtype("weight_scale") == "F16")

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        spec = self.packing().spec
        words = np.empty((self.out_features, spec.packed_columns(self.in_features)), np.uint32)
        for rows in row_blocks(self.out_features, self.in_features):
            words[rows] = pack_rows(self._codes(rows.start, rows.stop), spec.bits)
        scales = np.repeat(self._scales(), self.group // spec.group_size, axis=1)
        return affine_fields(words, scales, 8.0, place)

    def _codes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Numbers plus 8."""
        first, last = self.module.rows.start + start, self.module.rows.start + stop
        info = self.module.checkpoint[self.module.tensor("weight")]
        raw = self.module.reader.rows(info, first // 2, -(-last // 2))
        both = np.stack([raw & 0x0F, raw >> 4], axis=1).reshape(-1, self.in_features)
        return both[first % 2 :][: stop - start] ^ np.uint8(8)

    def _scales(self) -> Floats:
        rows = slice(self.module.first, self.module.first + self.out_features)
        return self.module.floats("weight_scale")[rows]
