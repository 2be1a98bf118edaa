"""GGUF's tensor types: their blocks, how they are dequantised, and the MLX packing that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral_convert.packing.measure import row_blocks
from mlx_mixtral_convert.packing.transcode import AFFINE, MICROFLOATS, dequantize_affine
from mlx_mixtral_convert.packing.values import NativePacking

__all__ = ["TYPES", "TYPES_BY_NAME", "GgufTensor", "GgufType", "dequantize", "native_packing"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GgufType:
    """A type: ``weights`` values in ``nbytes`` bytes."""

    name: str
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        return columns // self.weights * self.nbytes


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; ``shape`` is row-major (the file lists the fastest axis first)."""

    name: str
    kind: GgufType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.kind.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


# Number in the file -> type: ggml.h and ggml-common.h in ggml-org/llama.cpp. Types that only exist between two steps of a
# computation (Q8_1, Q8_K), integers and float64 are no model's weights.
TYPES: dict[int, GgufType] = {
    number: GgufType(*entry)
    for number, entry in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    }.items()
}  # fmt: skip
TYPES_BY_NAME = {kind.name: kind for kind in TYPES.values()}
# What does not fit as it is: bits of the groups of 32 its values are rounded into.
_ROUNDED = {"Q6_K": 8, "Q3_K": 6, "IQ4_NL": 8, "IQ4_XS": 8}


def native_packing(type_name: str) -> NativePacking | None:
    """The MLX packing for a type, None for a float type."""
    if type_name in FLOATS:
        return None
    if (fitting := AFFINE.get(type_name)) is not None:
        return NativePacking(fitting.spec, True, type_name, fitting.lossless)
    if (floats := MICROFLOATS.get(type_name)) is not None:
        return NativePacking(floats.spec, True, type_name, True)
    return NativePacking(QuantizationSpec(_ROUNDED.get(type_name, 4), 32), False, type_name)


def dequantize(raw: Bytes, type_name: str, out: npt.NDArray[np.float32]) -> None:
    """Rows of blocks ``[rows, row_bytes]`` as float32 ``[rows, columns]``; a scale that is not finite gives such values.

    The caller refuses those by name, so that numpy need not warn of them.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        _dequantize(raw, type_name, out)


def _dequantize(raw: Bytes, type_name: str, out: npt.NDArray[np.float32]) -> None:
    if (fitting := AFFINE.get(type_name)) is not None:
        dequantize_affine(raw, fitting, out)
    elif type_name == "Q6_K":
        for block in row_blocks(*out.shape):
            _q6_k(raw[block].reshape(-1, 210), out[block])
    else:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[type_name]
        for block in row_blocks(*out.shape):
            out[block] = quants.dequantize(np.ascontiguousarray(raw[block]), kind)


def _q6_k(blocks: Bytes, out: npt.NDArray[np.float32]) -> None:
    """Sixteen groups of 16: w = d sc (q - 32). Two runs of 64 bytes of low halves, two of 32 bytes of high bit pairs."""
    low = np.ascontiguousarray(blocks[:, :128]).reshape(-1, 2, 1, 64)
    high = np.ascontiguousarray(blocks[:, 128:192]).reshape(-1, 2, 1, 32)
    codes = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    codes |= (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    d = np.ascontiguousarray(blocks[:, 208:]).view(np.float16).astype(np.float32)
    scales = d * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    centred = (codes - np.uint8(32)).view(np.int8).reshape(-1, 16, 16)
    np.multiply(centred, scales[:, :, None], out=out.reshape(-1, 16, 16), dtype=np.float32)
