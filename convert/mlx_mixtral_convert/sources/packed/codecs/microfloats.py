"""Floats of 4 and 6 bits with a scale for each group of 16 or 32 inputs: MXFP4, MXFP6 and NVFP4.

``weight_packed`` (compressed-tensors) or ``weight`` (ModelOpt), U8 ``[out, in * bits / 8]``: a stream of codes, the first in
the lowest bits, as MLX has it. ``weight_scale`` is U8 or F8_E8M0 ``[out, in / 32]`` for the MX types, powers of two, and
F8_E4M3 ``[out, in / 16]`` for NVFP4, which is divided by ``weight_global_scale`` or multiplied by ``weight_scale_2``, one
number. 6-bit codes are e2m3: in eighths they are whole numbers up to 60, which 8 affine bits hold.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import ConversionError
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral_convert.packing.measure import E2M1, E2M3, E4M3, row_blocks, unpack
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.codecs.module import (
    POWERS,
    REQUANTISED,
    Codec,
    Floats,
    Module,
    affine_fields,
    powers_of_two,
)

__all__ = ["MicrofloatCodec"]

_GLOBAL = ("weight_global_scale", "weight_scale_2")


class MicrofloatCodec(Codec):
    """``codes`` is the field the codes lie in."""

    fields = ("weight", "weight_packed", "weight_scale", *_GLOBAL, "pre_quant_scale")

    def __init__(self, module: Module, matrix: Matrix) -> None:
        super().__init__(module, matrix)
        self.codes = "weight_packed" if module.has("weight_packed") else "weight"
        height, width = module.height, matrix.in_features
        self.bits = 6 if 4 * module.shape(self.codes)[-1] == 3 * width else 4
        module.expect(self.codes, ((height, width * self.bits // 8),), ("U8",))
        self.nvidia = module.dtype("weight_scale") == "F8_E4M3" and self.bits == 4
        self.group = 16 if self.nvidia else 32
        module.expect("weight_scale", ((height, -(-width // self.group)),), ("F8_E4M3",) if self.nvidia else POWERS)
        for field in _GLOBAL:
            if module.has(field):
                module.expect(field, ((), (1,), (1, 1)), FLOATS)
        if module.has("pre_quant_scale"):
            module.expect("pre_quant_scale", ((width,),), FLOATS)

    def decode(self, out: Floats) -> None:
        table = E2M1 if self.bits == 4 else E2M3
        earlier = self.module.floats("pre_quant_scale") if self.module.has("pre_quant_scale") else None
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                values = out[rows]
                values[:] = table[unpack(self.module.array(self.codes, rows.start, rows.stop), self.bits)]
                scales = np.repeat(self._scales(rows.start, rows.stop), self.group, axis=1)
                values *= scales[:, : self.in_features]
                if earlier is not None:
                    values *= earlier

    def packing(self) -> NativePacking:
        name = "NVFP4" if self.nvidia else f"MXFP{self.bits}"
        if self.in_features % self.group or self.in_features % 32 or self.module.has("pre_quant_scale"):
            return NativePacking(REQUANTISED, False, name)
        if self.nvidia:
            if self._factor != 1:
                return NativePacking(REQUANTISED, False, f"{name} with one more scale")
            return NativePacking(QuantizationSpec(4, 16, "nvfp4"), True, name, True)
        if self.bits == 4 and self._factor == 1:
            return NativePacking(QuantizationSpec(4, 32, "mxfp4"), True, name, True)
        return NativePacking(QuantizationSpec(8, 32), self._factor == 1, name, self._factor == 1)

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        raw = self.module.array(self.codes, 0, self.out_features)
        if self.bits == 4:
            scales = self.module.array("weight_scale", 0, self.out_features)
            return {"weight": np.ascontiguousarray(raw).view(np.uint32), "scales": scales}
        codes = np.empty((self.out_features, self.in_features), np.uint8)
        scales = self._scales(0, self.out_features) / np.float32(8)
        for rows in row_blocks(*codes.shape):
            codes[rows] = (8 * E2M3[unpack(raw[rows], self.bits)]).astype(np.int8).view(np.uint8)
        lost = (scales.astype(np.float16) != scales) & codes.reshape(*scales.shape, -1).any(axis=2)
        if lost.any():
            raise ConversionError(f"{place} has scales beyond float16's range; convert without --exact")
        # Groups of zeros may have any scale.
        scales[scales.astype(np.float16) != scales] = 0
        words = np.ascontiguousarray(codes ^ np.uint8(0x80)).view(np.uint32)
        return affine_fields(words, scales, 128.0, place)

    def _scales(self, start: int, stop: int) -> Floats:
        raw = self.module.array("weight_scale", start, stop)
        if self.nvidia:
            return np.asarray(E4M3[raw] * np.float32(self._factor), np.float32)
        return np.asarray(powers_of_two(raw) * np.float32(self._factor), np.float32)

    @cached_property
    def _factor(self) -> float:
        """What every scale is multiplied by."""
        with np.errstate(divide="ignore"):
            divided = self.module.floats(_GLOBAL[0]).reshape(-1)[0] if self.module.has(_GLOBAL[0]) else 1.0
            times = self.module.floats(_GLOBAL[1]).reshape(-1)[0] if self.module.has(_GLOBAL[1]) else 1.0
            return float(np.float32(times) / np.float32(divided))
