"""Float conversions against MLX's own casts: every 16-bit pattern, and the float32 patterns where rounding is decided."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.dtypes import FLOATS, MLX_DTYPES, NUMPY_DTYPES, as_numpy, bytes_of, convert, is_finite

Bits16 = npt.NDArray[np.uint16]

EVERY_16_BITS: Bits16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def _f32_bits() -> npt.NDArray[np.uint32]:
    """Random patterns, and around every 16-bit float: the value, the tie above it, and a bit to either side of the tie."""
    generator = np.random.default_rng(0)
    random = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    upper = np.arange(65536, dtype=np.uint32) << 16  # every bfloat16
    halves = EVERY_16_BITS.view(np.float16).astype(np.float32).view(np.uint32)
    # A tie between two float16 lies half a step above: 12 bits down in the float32 mantissa.
    ties = [upper, upper | 0x7FFF, upper | 0x8000, upper | 0x8001, upper | 0xFFFF]
    ties += [halves, halves + 0x0FFF, halves + 0x1000, halves + 0x1001]
    small = np.arange(0, 0x800000, 4099, dtype=np.uint32)  # float32 subnormals
    special = [0, 0x80000000, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x477FEFFF]
    special += [
        0x477FF000,
        0x477FE000,
        0x33000000,
        0x33000001,
        0x33800000,
        0x387FC000,
        0x38800000,
        0x7F7F7FFF,
        0x7F7F8000,
    ]
    return np.concatenate([random, *ties, small, small | 0x80000000, np.array(special, np.uint32)]).astype(np.uint32)


F32_BITS = _f32_bits()


def _mlx_cast(bits: npt.NDArray[Any], source: str, target: str) -> npt.NDArray[Any]:
    """The bits MLX's CPU backend gives."""
    with mx.stream(mx.cpu):
        array = mx.array(bits).view(MLX_DTYPES[source]).astype(MLX_DTYPES[target])
        return np.asarray(array.view(mx.uint32 if target == "F32" else mx.uint16))


def _ours(bits: npt.NDArray[Any], source: str, target: str) -> npt.NDArray[Any]:
    converted = convert(bits.view(NUMPY_DTYPES[source]), source, target)
    assert converted.dtype == NUMPY_DTYPES[target]
    return converted.view(np.uint32 if target == "F32" else np.uint16)


def _is_nan(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.bool_]:
    mask, infinity = {"F32": (0x7FFFFFFF, 0x7F800000), "F16": (0x7FFF, 0x7C00), "BF16": (0x7FFF, 0x7F80)}[dtype]
    return (bits & mask) > infinity


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FLOATS for t in FLOATS if s != t])
def test_conversions_give_the_bits_mlx_gives(source: str, target: str) -> None:
    bits = F32_BITS if source == "F32" else EVERY_16_BITS
    ours, theirs = _ours(bits, source, target), _mlx_cast(bits, source, target)
    nan = _is_nan(bits, source)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    # A NaN stays one, whatever its payload becomes; nothing else becomes one.
    np.testing.assert_array_equal(_is_nan(ours, target), nan)
    np.testing.assert_array_equal(_is_nan(theirs, target), nan)


def test_bfloat16_rounds_to_nearest_with_ties_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.00391, -1.00390625], np.float32)
    assert [hex(v) for v in convert(values, "F32", "BF16")] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0xbf80"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_widening_and_coming_back_changes_nothing(dtype: str) -> None:
    bits = EVERY_16_BITS if dtype != "F32" else F32_BITS
    finite = bits[~_is_nan(bits, dtype)].view(NUMPY_DTYPES[dtype])
    np.testing.assert_array_equal(convert(convert(finite, dtype, "F32"), "F32", dtype), finite)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "U32", "U8"])
def test_the_same_type_is_a_view(dtype: str) -> None:
    values = np.zeros(4, NUMPY_DTYPES[dtype])
    assert convert(values, dtype, dtype) is values


@pytest.mark.parametrize(("source", "target"), [("U8", "F32"), ("F32", "U8"), ("I32", "BF16"), ("F8_E4M3", "F16")])
def test_other_pairs_are_refused_with_both_names(source: str, target: str) -> None:
    with pytest.raises(CheckpointError, match=f"dtype {source} cannot be used as {target}"):
        convert(np.zeros(4, np.uint8), source, target)


@pytest.mark.parametrize("dtype", FLOATS)
def test_finiteness_is_judged_as_mlx_does_for_every_pattern(dtype: str) -> None:
    bits = F32_BITS[::37] if dtype == "F32" else EVERY_16_BITS[::3]
    array = mx.array(bits).view(MLX_DTYPES[dtype])
    finite = np.asarray(mx.isfinite(array))
    values = bits.view(NUMPY_DTYPES[dtype])
    assert is_finite(values[finite], dtype)
    for at in np.flatnonzero(~finite):
        assert not is_finite(values[at : at + 1], dtype)
    assert 0 < finite.sum() < len(finite)


@given(at=st.integers(0, 999), dtype=st.sampled_from(FLOATS))
def test_one_infinity_anywhere_is_found(at: int, dtype: str) -> None:
    values = np.zeros((10, 100), NUMPY_DTYPES[dtype])
    assert is_finite(values, dtype)
    values.reshape(-1)[at] = 0x7F80 if dtype == "BF16" else np.inf
    assert not is_finite(values, dtype)


@pytest.mark.parametrize("dtype", sorted(MLX_DTYPES))
def test_bytes_of_is_the_array_itself(dtype: str) -> None:
    array = mx.zeros((3, 5), MLX_DTYPES[dtype])
    mx.eval(array)
    memory = bytes_of(array)
    assert memory.nbytes == array.nbytes
    wanted = np.random.default_rng(1).integers(0, 120, array.nbytes).astype(np.uint8)
    memory[:] = wanted
    view = array.view(mx.uint8)  # computed by MLX, not read from our view
    np.testing.assert_array_equal(np.asarray(view + mx.array(0, mx.uint8)).reshape(-1), wanted)


@pytest.mark.skipif(sys.byteorder != "little", reason="safetensors is little endian")
def test_bytes_are_seen_as_rows_of_numbers() -> None:
    raw = np.arange(24, dtype=np.uint8).reshape(2, 12)
    assert as_numpy(raw, "F32").shape == (2, 3)
    assert as_numpy(raw, "BF16")[0, 0] == 0x0100
    assert np.shares_memory(as_numpy(raw, "U16"), raw)
