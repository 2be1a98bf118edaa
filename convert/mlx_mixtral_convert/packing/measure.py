"""How far packed weights are from their source, in numpy: independent of the kernels that packed them, and off their thread.

MLX packs the q of a row as one little-endian stream of bits; a group of g weights shares a scale. ``affine`` means
``w = scale * q + bias``. In mxfp4 and nvfp4 q is a float of 4 bits (e2m1), in mxfp8 one of 8 (e4m3); their scale is a byte,
a power of two (e8m0) for the mx modes and e4m3 for nvfp4 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.weights.dtypes import convert
from mlx_mixtral_convert.packing.values import Values

__all__ = [
    "E2M1", "E2M3", "E4M3", "E5M2", "ErrorSum", "MatrixError", "decode", "digits", "row_blocks", "unpack",
]  # fmt: skip

Floats = npt.NDArray[np.float32]
# Blocks that fit in a core's cache: five passes over them cost one over memory.
BLOCK_VALUES = 2**17


def _small_float(exponent_bits: int, mantissa_bits: int, bias: int) -> Floats:
    """All values of a sign, exponent and mantissa format, by code, subnormals included; codes for NaN come out as numbers."""
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = codes % 2**mantissa_bits
    exponent = codes >> mantissa_bits & 2**exponent_bits - 1
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    normal = exponent > 0
    magnitude = (mantissa / 2**mantissa_bits + normal) * 2.0 ** (np.where(normal, exponent, 1) - bias)
    values: Floats = (sign * magnitude).astype(np.float32)
    return values


E2M1, E2M3 = _small_float(2, 1, 1), _small_float(2, 3, 1)
E4M3, E5M2 = _small_float(4, 3, 7), _small_float(5, 2, 15)
# There is no infinity, and one NaN of each sign.
E4M3[[0x7F, 0xFF]] = np.nan
# As in IEEE's types: the highest exponent is infinity and NaN.
E5M2[[*range(0x7C, 0x80), *range(0xFC, 0x100)]] = np.nan
# Code 255 is NaN, which no packed weight has.
_E8M0 = np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)
_CODES = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}
_SCALES = {"mxfp4": _E8M0, "nvfp4": E4M3, "mxfp8": _E8M0}


@dataclass(frozen=True)
class MatrixError:
    """How far a packed matrix (all experts together) is from its source: ``‖w-ŵ‖/‖w‖`` and the largest ``|w-ŵ|``."""

    path: str
    spec: str
    relative_rms: float
    worst: float


@dataclass
class ErrorSum:
    """Squared error, squared weight and the largest error over everything added."""

    error: float = 0.0
    weight: float = 0.0
    worst: float = 0.0

    def add(self, values: Values, packed: Mapping[str, npt.NDArray[Any]], dtype: str, spec: QuantizationSpec) -> None:
        """Compare source ``values`` ``[rows, columns]`` with ``packed`` weight, scales and biases, blocks at a time.

        ``dtype`` is the safetensors type of affine scales and biases.
        """
        for block in row_blocks(*values.array.shape):
            source = convert(values.array[block], values.dtype, "F32")
            parts = {name: array[block] for name, array in packed.items()}
            if spec.has_biases:
                parts |= {name: convert(parts[name], dtype, "F32") for name in ("scales", "biases")}
            # A fresh array: subtracting in place never touches the source.
            difference = decode(parts, spec)
            difference -= source
            self.error += _squares(difference)
            self.weight += _squares(source)
            self.worst = max(self.worst, float(difference.max()), -float(difference.min()))

    @property
    def relative_rms(self) -> float:
        """``‖w-ŵ‖/‖w‖``; 0 for weights that are all zero."""
        return float((self.error / self.weight) ** 0.5) if self.weight else 0.0

    def summary(self, path: str, spec: QuantizationSpec) -> MatrixError:
        """For the record."""
        return MatrixError(path, str(spec), digits(self.relative_rms), digits(self.worst))


def digits(value: float) -> float:
    """Six significant digits: what is worth reading, and the same on every machine."""
    return float(f"{value:.6g}")


def decode(packed: Mapping[str, npt.NDArray[Any]], spec: QuantizationSpec) -> Floats:
    """Weights float32 ``[rows, columns]`` of packed rows: uint32 words, and scales and biases in float32 or bytes."""
    words = packed["weight"]
    codes = unpack(words, spec.bits)
    scales = packed["scales"]
    grouped = (len(words), -1, spec.group_size)
    if spec.has_biases:
        affine = codes.astype(np.float32).reshape(grouped)
        # A source's own scales may be too large; what is not finite is refused by name.
        with np.errstate(over="ignore", invalid="ignore"):
            affine *= scales[:, :, None]
            affine += packed["biases"][:, :, None]
        return affine.reshape(len(words), -1)
    weights = _CODES[spec.mode][codes].reshape(grouped)
    weights *= _SCALES[spec.mode][scales][:, :, None]
    return weights.reshape(len(words), -1)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over rows of about ``BLOCK_VALUES`` values each."""
    step = max(1, BLOCK_VALUES // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unpack(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """The codes of each row, uint8: ``32 / bits`` a word, read as a stream of bits from the lowest one on."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    # After `period` bytes the pattern of bit positions repeats.
    period, count = bits // gcd(bits, 8), 8 // gcd(bits, 8)
    stream = stream.reshape(len(words), -1, period)
    codes = np.empty((*stream.shape[:2], count), np.uint8)
    mask = np.uint8(2**bits - 1)
    for index in range(count):
        byte, shift = divmod(index * bits, 8)
        value = stream[:, :, byte] >> np.uint8(shift)
        if shift + bits > 8:
            value |= stream[:, :, byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(value, mask, out=codes[:, :, index])
    return codes.reshape(len(words), -1)


def _squares(values: Floats) -> float:
    # Not BLAS: its sums depend on the number of threads, and two runs have to give the same digits.
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))
