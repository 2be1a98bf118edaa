"""Modules packed from the formats' descriptions, in ways no library here writes or no longer does; and what they mean.

Each packer takes a module's weights ``[out, in]`` to its fields and the float32 weights they stand for, computed from the
numbers themselves and not from what was packed.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.convert.support import Floats

Fields = tuple[dict[str, npt.NDArray[Any]], Floats]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def bits_of(codes: npt.NDArray[Any], bits: int, *, padded: bool) -> npt.NDArray[np.int32]:
    """Rows of codes as int32 words, one code after the other by hand: straddling words, or whole codes to a word."""
    rows = []
    for row in codes.tolist():
        if padded:
            count = 32 // bits
            runs = [row[at : at + count] for at in range(0, len(row), count)]
            rows.append([sum(code << (bits * place) for place, code in enumerate(run)) for run in runs])
            continue
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([whole >> at & 0xFFFFFFFF for at in range(0, len(row) * bits, 32)])
    return np.array(rows, np.uint32).view(np.int32)


def integers(
    weight: Floats,
    bits: int,
    group: int,
    *,
    padded: bool = False,
    zeros: str = "",
    order: bool = False,
    dtype: npt.DTypeLike = np.float16,
) -> Fields:
    """compressed-tensors' pack-quantized; ``zeros`` is "packed" or "bytes" where there are zero points."""
    random = np.random.default_rng(weight.size)
    out, inputs = weight.shape
    groups = inputs // group
    codes = random.integers(0, 2**bits, (out, inputs))
    zero = random.integers(0, 2**bits, (out, groups)) if zeros else np.full((out, groups), 2 ** (bits - 1))
    scale = random.uniform(0.2, 1, (out, groups)).astype(dtype) * np.asarray(0.2 / 2**bits, dtype)
    of = random.permutation(np.arange(inputs) // group) if order else np.arange(inputs) // group
    meant = (codes - zero[:, of]).astype(np.float32) * scale[:, of].astype(np.float32)
    fields: dict[str, npt.NDArray[Any]] = {
        "weight_packed": bits_of(codes, bits, padded=padded),
        "weight_scale": scale,
        "weight_shape": np.array([out, inputs], np.int64),
    }
    if zeros == "packed":
        fields["weight_zero_point"] = np.ascontiguousarray(bits_of(zero.T, bits, padded=padded).T)
    elif zeros:
        fields["weight_zero_point"] = (zero - 2 ** (bits - 1)).astype(np.int8)
    if order:
        fields["weight_g_idx"] = of.astype(np.int32)
    return fields, meant


def bytes_with_zeros(weight: Floats) -> Fields:
    """int-quantized, not symmetric: a scale and a zero point a row."""
    random = np.random.default_rng(weight.size)
    codes = random.integers(-128, 128, weight.shape).astype(np.int8)
    zero = random.integers(-128, 128, (len(weight), 1)).astype(np.int8)
    scale = random.uniform(1e-4, 1e-3, (len(weight), 1)).astype(np.float32)
    meant = (codes.astype(np.float32) - zero) * scale
    return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}, meant


def fp8_blocks(weight: Floats, table: Floats, rows: int, columns: int, field: str, *, powers: bool = False) -> Fields:
    """FP8 with a scale for each block, the last ones cut off; ``powers``: as bytes of exponents."""
    random = np.random.default_rng(weight.size)
    codes = random.integers(0, 0x78, weight.shape).astype(np.uint8) | random.choice([0, 0x80], weight.shape).astype(
        np.uint8
    )
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    exponents = random.integers(110, 116, grid)
    scale = 2.0 ** (exponents - 127) if powers else random.uniform(1e-5, 1e-4, grid)
    meant = np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(*weight.shape):
        meant[i, j] = table[codes[i, j]] * np.float32(scale[i // rows, j // columns])
    return {"weight": codes, field: exponents.astype(np.uint8) if powers else scale.astype(np.float32)}, meant


def nvfp4(weight: Floats, table: Floats, whole: float, field: str, codes_field: str) -> Fields:
    """Pairs of 4-bit floats in bytes, e4m3 for each 16, and one number for the tensor."""
    random = np.random.default_rng(weight.size)
    codes = random.integers(0, 16, weight.shape)
    scale = random.integers(1, 0x40, (len(weight), weight.shape[1] // 16))
    values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    factor = np.float32(1 / whole) if field == "weight_global_scale" else np.float32(whole)
    meant = values * np.repeat(table[scale] * factor, 16, axis=1)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    number = np.array([whole], np.float32) if field == "weight_global_scale" else np.array(whole, np.float32)
    return {codes_field: packed, "weight_scale": scale.astype(np.uint8), field: number}, meant.astype(np.float32)


def row_pairs(weight: Floats, group: int, *, scaled_inputs: bool = False) -> Fields:
    """ModelOpt's W4A16_AWQ: signed numbers of two rows in a byte, the even row's low."""
    random = np.random.default_rng(weight.size)
    numbers = random.integers(-8, 8, weight.shape)
    scale = random.uniform(1e-3, 1e-2, (len(weight), weight.shape[1] // group)).astype(np.float16)
    meant = numbers.astype(np.float32) * np.repeat(scale.astype(np.float32), group, axis=1)
    nibbles = numbers & 15
    fields: dict[str, npt.NDArray[Any]] = {
        "weight": (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8),
        "weight_scale": scale,
    }
    if scaled_inputs:
        fields["pre_quant_scale"] = random.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
        meant *= fields["pre_quant_scale"]
    return fields, meant


def lookup(weight: Floats, block: int = 64) -> Fields:
    """bitsandbytes' nf4, nested, with a table of its own."""
    random = np.random.default_rng(weight.size)
    table = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
    outer, codes = random.uniform(-1, 1, 256).astype(np.float32), random.integers(0, 16, weight.size)
    blocks = -(-weight.size // block)
    inner, nested = random.integers(0, 256, blocks), random.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
    state = {"blocksize": block, "nested_blocksize": 256, "nested_offset": 0.25, "shape": list(weight.shape)}
    meant = np.empty(weight.size, np.float32)
    for at, code in enumerate(codes):
        number = inner[at // block]
        meant[at] = table[code] * np.float32(outer[number] * nested[at // block // 256] + np.float32(0.25))
    return {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": inner.astype(np.uint8),
        "weight.quant_map": table,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": outer,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }, meant.reshape(weight.shape)
