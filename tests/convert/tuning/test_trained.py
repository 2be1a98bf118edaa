"""A packed matrix that learns: where it starts, what a step does, and what it is packed as."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.packing.gptq import gptq
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.tuning.packed import columns_of, dequantized, joined, rows_of
from mlx_mixtral_convert.tuning.trained import Rates, TrainedMatrix, shares_of_rate, steps_for
from tests.convert.packing.test_gptq import inputs
from tests.convert.packing.test_search import random_weights

RATES = Rates(codes=0.1, scales=0.01)
SPECS = [QuantizationSpec(bits, group) for bits, group in ((2, 32), (2, 128), (3, 64), (4, 64), (5, 32), (6, 128))]


def started(spec: QuantizationSpec, dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, dict[str, mx.array]]:
    weights = random_weights(1, 48, 256).astype(mx.float32)
    return weights, search(weights.astype(dtype), spec)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_starts_as_it_was_packed(spec: QuantizationSpec, dtype: mx.Dtype) -> None:
    weights, packed = started(spec, dtype)
    matrix = TrainedMatrix(weights, packed, spec, RATES)
    assert mx.array_equal(matrix.values, dequantized(packed, spec))
    for field, array in matrix.packed().items():
        assert array.dtype == packed[field].dtype
        assert mx.array_equal(array, packed[field]), field


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_it_is_packed_as_has_the_values_it_learned_with(spec: QuantizationSpec) -> None:
    weights, packed = started(spec)
    matrix = TrainedMatrix(weights, packed, spec, RATES)
    random = np.random.default_rng(0)
    for share in shares_of_rate(20):
        matrix.learn(mx.array(random.standard_normal(weights.shape).astype(np.float32)), share)
    learned = matrix.packed()
    assert not mx.array_equal(learned["weight"], packed["weight"])
    assert mx.array_equal(dequantized(learned, spec), matrix.values)


def test_the_first_step_is_that_of_adam() -> None:
    """Adam's first step is its rate against the gradient's sign, whatever the gradient's size."""
    spec = QuantizationSpec(3, 64)
    weights, packed = started(spec, mx.float32)
    matrix = TrainedMatrix(weights, packed, spec, Rates(codes=0.0, scales=0.01))
    matrix.learn(mx.ones(weights.shape) * 1e-3, 0.5)
    moved = np.array(packed["biases"]) - np.array(matrix.packed()["biases"])
    expected = 0.5 * 0.01 * np.abs(np.array(packed["scales"])).mean() * 7 / 2
    np.testing.assert_allclose(moved, expected, rtol=1e-3)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.95), (3, 0.92)])
def test_on_states_that_are_off_it_makes_up_for_more_than_error_compensation(bits: int, share: float) -> None:
    """``y = W x`` is wanted, ``x + e`` is met: rounding to W cannot be best, for the error is seen."""
    spec, weights = QuantizationSpec(bits, 64), random_weights(2, 48, 256)
    x, fresh = inputs(256), inputs(256, seed=0)[:600]
    random = np.random.default_rng(3)
    off, fresh_off = (a * (1 + 0.3 * random.standard_normal(a.shape).astype(np.float32)) for a in (x, fresh))
    true = np.array(weights.astype(mx.float32))
    packed = gptq(weights, spec, [off.T @ off / len(off)])
    matrix = TrainedMatrix(weights.astype(mx.float32), packed, spec, RATES)
    met, wanted = mx.array(off), mx.array(x @ true.T)
    for step in shares_of_rate(80):
        rows = mx.array(random.integers(len(x), size=256).astype(np.int32))
        matrix.learn((met[rows] @ matrix.values.T - wanted[rows]).T @ met[rows], step)

    def error(values: mx.array) -> float:
        return float(np.square(fresh_off @ np.array(values).T - fresh @ true.T).mean())

    assert error(matrix.values) < share * error(dequantized(packed, spec))


def test_blocks_joined_are_the_whole() -> None:
    spec = QuantizationSpec(3, 64)
    _, packed = started(spec)
    halves = [columns_of(packed, slice(start, start + 128), 256) for start in (0, 128)]
    thirds = [rows_of(packed, slice(start, start + 16)) for start in (0, 16, 32)]
    values = dequantized(packed, spec)
    assert mx.array_equal(dequantized(halves[1], spec), values[:, 128:])
    assert mx.array_equal(dequantized(joined(halves, 1), spec), values)
    assert mx.array_equal(dequantized(joined(thirds, 0), spec), values)


def test_few_tokens_are_not_learned_by_heart() -> None:
    assert steps_for(120, 25_000, 512) == 120
    assert steps_for(120, 1_280, 512) == 10
    assert steps_for(120, 64, 512) == 1
