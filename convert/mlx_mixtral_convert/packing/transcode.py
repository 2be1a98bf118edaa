"""Blocks of GGUF as MLX packs weights: the codes move as they are, only their order within a word changes.

Both store a group of weights as small integers q with ``w = scale * q + bias``, or as floats of 4 bits. MLX packs the q of a
row as one little-endian stream of bits. GGUF's blocks (ggml-common.h and ggml-quants.c in ggml-org/llama.cpp) hold a group's
first 16 q in low and its last 16 in high halves of bytes; Q4_K and Q5_K hold eight groups in a block of 256, with 6-bit scales.

    Q4_0, Q5_0, Q8_0   scale d, bias -8 d, -16 d, -128 d     d is float16: nothing is lost
    Q4_1, Q5_1         scale d, bias m                       nothing is lost
    Q4_K, Q5_K         scale d * sc, bias -dmin * m          products that float16 rounds
    TQ1_0, TQ2_0       scale d, bias -d, q in 0, 1, 2        nothing is lost
    MXFP4, NVFP4       a byte of scale, codes e2m1           MLX's mxfp4 and nvfp4, nothing is lost
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.packing.measure import row_blocks

__all__ = [
    "AFFINE",
    "MICROFLOATS",
    "AffineType",
    "MicrofloatType",
    "dequantize_affine",
    "transcode",
    "transcode_floats",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AffineType:
    """A GGUF type whose blocks are groups of ``group`` integers with a scale and a bias.

    ``codes`` gives the integers of blocks ``[n, block_bytes]`` in the order of the weights, ``stream`` the same as MLX's
    bytes, ``scales`` scale and bias of each group ``[n, groups]`` in float32. ``lossless``: float16 holds them.
    """

    bits: int
    weights: int
    block_bytes: int
    lossless: bool
    scales: Callable[[Bytes], tuple[Floats, Floats]]
    codes: Callable[[Bytes], Bytes]
    stream: Callable[[Bytes], Bytes]
    group: int = 32

    @property
    def spec(self) -> QuantizationSpec:
        return QuantizationSpec(self.bits, self.group)


@dataclass(frozen=True)
class MicrofloatType:
    """A GGUF type whose blocks are groups of 4-bit floats with a byte of scale each, in MLX's mode ``spec``."""

    spec: QuantizationSpec
    weights: int
    block_bytes: int
    scales: Callable[[Bytes], Bytes]
    stream: Callable[[Bytes], Bytes]


def transcode(raw: Bytes, kind: AffineType, place: str) -> dict[Field, npt.NDArray[Any]]:
    """Rows of blocks ``[rows, row_bytes]`` as MLX's words (uint32), scales and biases (float16), a cache's worth at a time.

    Raises:
        ConversionError: a scale or bias of the tensor at ``place`` is beyond float16's range or not finite.
    """
    rows, columns = len(raw), raw.shape[1] // kind.block_bytes * kind.weights
    words = np.empty((rows, columns * kind.bits // 32), np.uint32)
    scales, biases = (np.empty((rows, columns // kind.group), np.float16) for _ in range(2))
    stream = words.view(np.uint8)
    for block in row_blocks(rows, columns):
        parts = raw[block].reshape(-1, kind.block_bytes)
        stream[block] = kind.stream(parts).reshape(-1, stream.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for held, values in zip((scales, biases), kind.scales(parts), strict=True):
                held[block] = values.reshape(-1, columns // kind.group)
    for held in (scales, biases):
        if not np.isfinite(held).all():
            raise ConversionError(f"{place} has a scale or bias that float16 cannot hold; convert without --exact")
    return {"weight": words, "scales": scales, "biases": biases}


def transcode_floats(raw: Bytes, kind: MicrofloatType, place: str) -> dict[Field, npt.NDArray[Any]]:
    """The same of floats: words (uint32) and scales (uint8).

    Raises:
        ConversionError: a scale that means 2^128 there and NaN here.
    """
    rows, columns = len(raw), raw.shape[1] // kind.block_bytes * kind.weights
    stream = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // kind.spec.group_size), np.uint8)
    for block in row_blocks(rows, columns):
        parts = raw[block].reshape(-1, kind.block_bytes)
        stream[block] = kind.stream(parts).reshape(-1, columns // 2)
        scales[block] = kind.scales(parts).reshape(-1, scales.shape[1])
    if (scales == 255).any():
        raise ConversionError(f"{place} has a scale of 2^128, for which MLX has no code; convert without --exact")
    return {"weight": stream.view(np.uint32), "scales": scales}


def dequantize_affine(raw: Bytes, kind: AffineType, out: Floats) -> None:
    """The weights of rows of blocks, float32: what the file means, bit for bit but for the sign of zeros."""
    columns = out.shape[1]
    for block in row_blocks(len(raw), columns):
        parts = raw[block].reshape(-1, kind.block_bytes)
        scales, biases = kind.scales(parts)
        target = out[block].reshape(*scales.shape, kind.group)
        np.multiply(kind.codes(parts).reshape(target.shape), scales[..., None], out=target, dtype=np.float32)
        target += biases[..., None]


def _float16(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _symmetric(zero: int) -> Callable[[Bytes], tuple[Floats, Floats]]:
    def scales(blocks: Bytes) -> tuple[Floats, Floats]:
        d = _float16(blocks, 0)
        return d, d * np.float32(-zero)

    return scales


def _asymmetric(blocks: Bytes) -> tuple[Floats, Floats]:
    return _float16(blocks, 0), _float16(blocks, 2)


def _super_block(blocks: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and minima in 12 bytes: bytes 0-3 and 4-7 begin with those of groups 0-3, 8-11 hold the low four
    bits of those of groups 4-7, whose high two bits are the top ones of bytes 0-7."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc, m = (np.empty((len(blocks), 8), np.float32) for _ in range(2))
    sc[:, :4], m[:, :4] = first & 0x3F, second & 0x3F
    sc[:, 4:], m[:, 4:] = (low & 0x0F) | (first >> 2 & 0x30), (low >> 4) | (second >> 2 & 0x30)
    sc *= _float16(blocks, 0)
    m *= -_float16(blocks, 2)
    return sc, m


def _halves(at: int, run: int) -> Callable[[Bytes], Bytes]:
    """4-bit codes: of each run of bytes the low halves, then the high ones."""

    def codes(blocks: Bytes) -> Bytes:
        packed = np.ascontiguousarray(blocks[:, at:]).reshape(len(blocks), -1, run)
        out = np.empty((len(blocks), packed.shape[1], 2, run), np.uint8)
        np.bitwise_and(packed, 0x0F, out=out[:, :, 0])
        np.right_shift(packed, 4, out=out[:, :, 1])
        return out.reshape(len(blocks), -1)

    return codes


def _half_stream(at: int, run: int) -> Callable[[Bytes], Bytes]:
    """The same codes, two a byte in the order of the weights: neighbouring bytes' low halves meet, then their high halves."""

    def stream(blocks: Bytes) -> Bytes:
        pairs = np.ascontiguousarray(blocks[:, at:]).view("<u2").reshape(len(blocks), -1, run // 2)
        out = np.empty((len(blocks), pairs.shape[1], 2, run // 2), np.uint8)
        # The casts to a byte drop what lies above bit 7.
        out[:, :, 0] = (pairs & 0x0F) | (pairs >> 4 & 0xF0)
        out[:, :, 1] = (pairs >> 4 & 0x0F) | (pairs >> 8 & 0xF0)
        return out.reshape(len(blocks), -1)

    return stream


def _fifth_bits(at: int) -> Callable[[Bytes], Bytes]:
    """Q5_0 and Q5_1: four bytes of fifth bits, one a weight, before the halves."""
    halves = _halves(at + 4, 16)

    def codes(blocks: Bytes) -> Bytes:
        high = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
        return halves(blocks) | high << np.uint8(4)

    return codes


def _q5_k(blocks: Bytes) -> Bytes:
    """32 bytes of fifth bits before the halves: bit g of byte i is weight i's of group g."""
    codes = _halves(48, 32)(blocks).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    codes |= (high & 1) << 4
    return codes.reshape(len(blocks), -1)


def _five_bit_stream(codes: Callable[[Bytes], Bytes]) -> Callable[[Bytes], Bytes]:
    """Eight codes in eight bytes become 40 bits: neighbours are joined three times over."""

    def stream(blocks: Bytes) -> Bytes:
        x = codes(blocks).view("<u8")
        x = (x & 0x001F001F001F001F) | (x & 0x1F001F001F001F00) >> np.uint64(3)
        x = (x & 0x000003FF000003FF) | (x & 0x03FF000003FF0000) >> np.uint64(6)
        x = (x & 0x00000000000FFFFF) | (x & 0x000FFFFF00000000) >> np.uint64(12)
        return np.ascontiguousarray(x.view(np.uint8).reshape(len(blocks), -1, 8)[:, :, :5])

    return stream


def _q8_0(blocks: Bytes) -> Bytes:
    """Signed bytes; turning the top bit adds 128."""
    return blocks[:, 2:] ^ np.uint8(0x80)


def _ternary(at: int) -> Callable[[Bytes], tuple[Floats, Floats]]:
    """One scale for a block of 256, which is two groups of 128."""

    def scales(blocks: Bytes) -> tuple[Floats, Floats]:
        d = np.repeat(_float16(blocks, at)[:, :1], 2, axis=1)
        return d, -d

    return scales


def _tq2_0(blocks: Bytes) -> Bytes:
    """Of each run of 32 bytes the lowest pairs of bits, then the next ones."""
    runs = np.ascontiguousarray(blocks[:, :64]).reshape(-1, 2, 1, 32)
    codes: Bytes = (runs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)).astype(np.uint8)
    return codes.reshape(len(blocks), -1)


def _tq1_0(blocks: Bytes) -> Bytes:
    """Five digits of base 3 a byte, the first highest, as a fraction of 256: runs of 32 bytes and of 16, then four digits each
    of 4 bytes."""
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        # Multiplied in a byte, what was read before falls out at the top.
        moved = blocks[:, None, start:stop] * np.array([1, 3, 9, 27, 81], np.uint8)[:digits, None]
        parts.append((moved.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(blocks), -1))
    return np.concatenate(parts, axis=1)


def _two_bit_stream(codes: Callable[[Bytes], Bytes]) -> Callable[[Bytes], Bytes]:
    def stream(blocks: Bytes) -> Bytes:
        four = codes(blocks).reshape(len(blocks), -1, 4)
        joined: Bytes = (
            four[..., 0] | four[..., 1] << np.uint8(2) | four[..., 2] << np.uint8(4) | four[..., 3] << np.uint8(6)
        )
        return joined

    return stream


def _nvfp4_scales(blocks: Bytes) -> Bytes:
    """Without a sign; the code that means NaN in e4m3 means 0 there."""
    scales = blocks[:, :4] & np.uint8(0x7F)
    return np.where(scales == 0x7F, np.uint8(0), scales)


AFFINE: dict[str, AffineType] = {
    "Q4_0": AffineType(4, 32, 18, True, _symmetric(8), _halves(2, 16), _half_stream(2, 16)),
    "Q4_1": AffineType(4, 32, 20, True, _asymmetric, _halves(4, 16), _half_stream(4, 16)),
    "Q5_0": AffineType(5, 32, 22, True, _symmetric(16), _fifth_bits(2), _five_bit_stream(_fifth_bits(2))),
    "Q5_1": AffineType(5, 32, 24, True, _asymmetric, _fifth_bits(4), _five_bit_stream(_fifth_bits(4))),
    "Q8_0": AffineType(8, 32, 34, True, _symmetric(128), _q8_0, _q8_0),
    "Q4_K": AffineType(4, 256, 144, False, _super_block, _halves(16, 32), _half_stream(16, 32)),
    "Q5_K": AffineType(5, 256, 176, False, _super_block, _q5_k, _five_bit_stream(_q5_k)),
    "TQ1_0": AffineType(2, 256, 54, True, _ternary(52), _tq1_0, _two_bit_stream(_tq1_0), 128),
    "TQ2_0": AffineType(2, 256, 66, True, _ternary(64), _tq2_0, _two_bit_stream(_tq2_0), 128),
}
MICROFLOATS: dict[str, MicrofloatType] = {
    "MXFP4": MicrofloatType(
        QuantizationSpec(4, 32, "mxfp4"), 32, 17, lambda blocks: blocks[:, :1], _half_stream(1, 16)
    ),
    "NVFP4": MicrofloatType(QuantizationSpec(4, 16, "nvfp4"), 64, 36, _nvfp4_scales, _half_stream(4, 8)),
}
