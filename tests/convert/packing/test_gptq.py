"""Error compensation: less output error than rounding each weight alone, in the same format."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.calibration.statistics import hessian_blocks
from mlx_mixtral_convert.packing import gptq as gptq_module
from mlx_mixtral_convert.packing.gptq import _Block, _Moments, gptq
from mlx_mixtral_convert.packing.search import search
from tests.convert.packing.test_search import plain, random_weights, restored

Floats = npt.NDArray[np.float32]


def inputs(columns: int, tokens: int = 2000, seed: int = 0) -> Floats:
    """Correlated inputs, as hidden states are."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((columns // 4, columns)).astype(np.float32)
    x = random.standard_normal((tokens, columns // 4)).astype(np.float32) @ mixing
    return (x + 2 * random.standard_normal((tokens, columns))).astype(np.float32)


def output_error(weights: mx.array, packed: dict[str, mx.array], spec: QuantizationSpec, x: Floats) -> float:
    """``‖x (W - Ŵ)^T‖²`` computed on the inputs themselves."""
    return float(np.square(x @ (np.array(weights.astype(mx.float32)) - restored(packed, spec)).T).mean())


def block_of(weights: mx.array, x: Floats, spec: QuantizationSpec) -> _Block:
    return _Block(np.array(weights.astype(mx.float32)), _Moments(x.T @ x / len(x)), spec, mx.bfloat16)


def values_of(block: _Block) -> Floats:
    """What its codes stand for, rows first."""
    scales, biases = (np.repeat(field, block.spec.group_size, axis=0) for field in (block.scales, block.biases))
    values: Floats = (block.codes * scales + biases).T
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_output_error_is_well_below_that_of_search(bits: int) -> None:
    spec, weights, x = QuantizationSpec(bits, 64), random_weights(1, 48, 256), inputs(256)
    hessian = x.T @ x / len(x)
    found = gptq(weights, spec, [hessian])
    fresh = inputs(256, seed=0)[:500] * 1.1
    searched = search(weights, spec, mx.array(np.diagonal(hessian).copy()))
    assert output_error(weights, found, spec, fresh) < 0.6 * output_error(weights, searched, spec, fresh)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        name: (a.shape, a.dtype) for name, a in plain(weights, spec).items()
    }


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    spec, weights = QuantizationSpec(4, 64), random_weights(2, 16, 128)
    identity = np.eye(128, dtype=np.float32)
    found, searched = gptq(weights, spec, [identity]), search(weights, spec)
    ours, theirs = (
        np.square(np.array(weights.astype(mx.float32)) - restored(p, spec)).sum() for p in (found, searched)
    )
    assert ours <= theirs * 1.001


def test_every_sweep_lowers_the_loss() -> None:
    weights, x = random_weights(3, 32, 128), inputs(128)
    block = block_of(weights, x, QuantizationSpec(3, 32))

    def loss() -> float:
        residual = block.weights.T - values_of(block)
        np.testing.assert_allclose(block.residual.T, residual, atol=1e-6)
        return float(((residual @ block.moments.hessian) * residual).sum())

    block.compensate()
    losses = [loss()]
    for sweep in (block.refit_groups, block.refit_codes) * 2:
        sweep()
        losses.append(loss())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_blocks_of_columns_are_independent() -> None:
    spec, weights, x = QuantizationSpec(4, 64), random_weights(4, 8, 256), inputs(256)
    hessian = x.T @ x / len(x)
    whole = restored(gptq(weights, spec, [hessian[:128, :128], hessian[128:, 128:]]), spec)
    first = restored(gptq(weights[:, :128], spec, [hessian[:128, :128]]), spec)
    assert np.array_equal(whole[:, :128], first)


@pytest.mark.parametrize("columns", [32, 128, 384, 1024, 4096, 14336, 6144, 16384])
def test_hessian_blocks_cover_the_columns_in_whole_groups(columns: int) -> None:
    blocks = hessian_blocks(columns)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(columns))
    assert all(block.stop - block.start <= 1024 for block in blocks)
    assert all(block.start % 128 == 0 for block in blocks)


def test_inputs_that_were_silent_do_no_harm() -> None:
    spec, weights, x = QuantizationSpec(4, 64), random_weights(5, 8, 128), inputs(128)
    x[:, 5:40] = 0
    assert np.isfinite(restored(gptq(weights, spec, [x.T @ x / len(x)]), spec)).all()
    assert np.isfinite(restored(gptq(weights, spec, [np.zeros((128, 128), np.float32)]), spec)).all()


def test_one_pass_alone_makes_up_for_what_it_rounded() -> None:
    """Without the sweeps after it, which would mend a wrong sign."""
    spec, weights, x = QuantizationSpec(3, 32), random_weights(6, 24, 256), inputs(256)
    block = block_of(weights, x, spec)
    block.compensate()
    searched = restored(search(weights, spec, mx.array(np.diagonal(block.moments.hessian).copy())), spec)
    ours, theirs = (np.square(x @ (block.weights.T - found).T).mean() for found in (values_of(block), searched))
    assert ours < 0.75 * theirs


def test_rows_do_not_depend_on_those_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what a product of another shape rounds otherwise, which may tip a code."""
    spec, weights, x = QuantizationSpec(3, 64), random_weights(7, 40, 128), inputs(128)
    hessian = [x.T @ x / len(x)]
    whole = gptq(weights, spec, hessian)
    monkeypatch.setattr(gptq_module, "ROWS", 16)
    parts = gptq(weights, spec, hessian)
    assert output_error(weights, parts, spec, x) == pytest.approx(output_error(weights, whole, spec, x), rel=1e-3)
    assert (restored(parts, spec) == restored(whole, spec)).mean() > 0.99


def test_the_pass_is_that_of_the_paper_written_out() -> None:
    """Column by column, all later ones changed at once: with the same scales the same codes, but for rounding."""
    spec, weights, x = QuantizationSpec(3, 32), random_weights(8, 40, 256), inputs(256)
    block = block_of(weights, x, spec)
    block.compensate()
    inverse = np.linalg.inv(block.moments.hessian.astype(np.float64))
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    values = np.array(weights.astype(mx.float32)).astype(np.float64)
    same = []
    for column in range(256):
        scale, bias = block.scales[column // 32], block.biases[column // 32]
        codes = np.clip(np.round((values[:, column] - bias) / scale), 0, 7)
        same.append((codes == block.codes[column]).mean())
        error = (values[:, column] - (codes * scale + bias)) / factor[column, column]
        values[:, column + 1 :] -= np.outer(error, factor[column, column + 1 :])
    assert np.mean(same) > 0.99


def test_codes_are_revisited_one_at_a_time_at_their_optimum() -> None:
    spec, weights, x = QuantizationSpec(3, 32), random_weights(9, 40, 128), inputs(128)
    block = block_of(weights, x, spec)
    block.compensate()
    hessian, codes = block.moments.hessian.astype(np.float64), block.codes.T.astype(np.float64)
    residual = block.weights.T - values_of(block).astype(np.float64)
    block.refit_codes()
    for column in range(128):
        scale, bias = block.scales[column // 32], block.biases[column // 32]
        best = codes[:, column] * scale + bias + residual @ hessian[:, column] / hessian[column, column]
        new = np.clip(np.round((best - bias) / scale), 0, 7)
        residual[:, column] -= (new - codes[:, column]) * scale
        codes[:, column] = new
    assert (block.codes == codes.T).mean() > 0.99
