"""Products on the CPU backend against sums in float64, and that no row depends on the rows beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers import blas
from mlx_mixtral.layers.cpu import CpuProducts, products_for
from mlx_mixtral.layers.linear import MLX, Linear, StackedLinear
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.processor import one_blas_thread, thread_count

SPECS = [
    *(QuantizationSpec(bits, 64) for bits in (1, 2, 3, 4, 5, 6, 8)),
    QuantizationSpec(4, 32),
    QuantizationSpec(4, 128),
    QuantizationSpec(4, 32, "mxfp4"),
    QuantizationSpec(4, 16, "nvfp4"),
    QuantizationSpec(8, 32, "mxfp8"),
]
Values = npt.NDArray[Any]


def _packed(
    shape: tuple[int, ...], spec: QuantizationSpec | None, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], Values]:
    """Arrays as a model holds them, and the numbers they mean, by MLX's own dequantisation."""
    weight = mx.array(np.random.default_rng(1).standard_normal(shape, np.float32))
    if spec is None:
        held = weight.astype(dtype)
        mx.eval(held)
        return {"weight": held}, np.asarray(held.astype(mx.float32), np.float64)
    packed = mx.quantize(weight, spec.group_size, spec.bits, spec.mode)
    packed = [packed[0], *(part if part.dtype == mx.uint8 else part.astype(dtype) for part in packed[1:])]
    exact = [part.astype(mx.float32) if spec.has_biases else part for part in packed[1:]]
    dense = mx.dequantize(
        packed[0],
        exact[0],
        exact[1] if spec.has_biases else None,
        spec.group_size,
        spec.bits,
        spec.mode,
        dtype=mx.float32,
    )
    mx.eval(packed)
    return dict(zip(("weight", "scales", "biases"), packed, strict=False)), np.asarray(dense, np.float64)


def _x(*shape: int) -> mx.array:
    x = mx.array(np.random.default_rng(2).standard_normal(shape, np.float32))
    mx.eval(x)
    return x


def _close(got: mx.array, wanted: Values, tolerance: float = 1e-5) -> None:
    scale = np.abs(wanted).max()
    assert np.abs(np.asarray(got.astype(mx.float32)) - wanted).max() < tolerance * scale


@pytest.mark.parametrize("spec", [*SPECS, None], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_many_rows_meet_the_numbers_that_the_codes_mean(spec: QuantizationSpec | None, dtype: mx.Dtype) -> None:
    arrays, dense = _packed((300, 512), spec, dtype)
    x = _x(2, 7, 512)
    _close(Linear(arrays, spec, CpuProducts(2))(x), np.asarray(x, np.float64) @ dense.T)


@pytest.mark.parametrize("spec", [SPECS[2], None], ids=str)
def test_every_pair_meets_its_own_slot(spec: QuantizationSpec | None) -> None:
    arrays, dense = _packed((5, 64, 512), spec, mx.float32)
    slots = np.array([0, 0, 0, 2, 3, 3, 4])
    x = _x(7, 1, 512)
    got = StackedLinear(arrays, spec, CpuProducts(2))(x, mx.array(slots), is_sorted=True)
    _close(got[:, 0], np.stack([dense[slot] @ row for slot, row in zip(slots, np.asarray(x[:, 0]), strict=True)]))


@pytest.mark.parametrize("out", [33, 160, 1500])
@pytest.mark.parametrize("rows_agree", [True, False])
def test_no_row_depends_on_those_beside_it(out: int, monkeypatch: pytest.MonkeyPatch, *, rows_agree: bool) -> None:
    if not rows_agree:
        monkeypatch.setattr(blas, "rows_agree", lambda: False)
    arrays, _ = _packed((out, 768), SPECS[2], mx.float32)
    layer, x = Linear(arrays, SPECS[2], CpuProducts(2)), _x(1, 131, 768)
    whole = np.asarray(layer(x))
    for count in (2, 3, 8, 17, 64, 130):
        for start in {0, 1, 131 - count}:
            assert np.array_equal(np.asarray(layer(x[:, start : start + count])), whole[:, start : start + count])


def test_the_number_of_threads_changes_no_bit() -> None:
    arrays, _ = _packed((4, 1500, 512), SPECS[2], mx.float32)
    slots = mx.array(np.repeat(np.arange(4), 20))
    x, one = _x(80, 1, 512), _x(1, 1, 1, 1, 512)
    results = [
        [
            np.asarray(layer(x, slots, is_sorted=True)),
            np.asarray(layer(one, mx.array([[[1, 3]]]), is_sorted=False)),
        ]
        for layer in (StackedLinear(arrays, SPECS[2], CpuProducts(threads)) for threads in (1, 2, 5))
    ]
    for others in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_decode_step_has_the_bits_of_mlx() -> None:
    arrays, _ = _packed((4096, 512), SPECS[2], mx.float32)
    x = _x(1, 1, 512)
    assert np.array_equal(
        np.asarray(Linear(arrays, SPECS[2], CpuProducts(3))(x)), np.asarray(Linear(arrays, SPECS[2])(x))
    )


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_of_a_step_has_the_bits_of_mlx(*, is_masked: bool) -> None:
    q, k, v = _x(2, 8, 1, 64), _x(2, 4, 1100, 64), _x(2, 4, 1100, 64)
    mask = mx.arange(1100)[None, None, None] < mx.array([900, 1100])[:, None, None, None] if is_masked else None
    wanted = np.asarray(MLX.attention(q, k, v, 0.3, mask))
    for threads in (2, 3, 9):
        assert np.array_equal(np.asarray(CpuProducts(threads).attention(q, k, v, 0.3, mask)), wanted)


@pytest.mark.parametrize("mask", ["causal", "window", None])
@pytest.mark.parametrize(("length", "columns"), [(5, 5), (40, 300), (300, 700)])
def test_attention_is_a_loop_over_heads(mask: str | None, length: int, columns: int) -> None:
    q, k, v = _x(2, 4, length, 32), _x(2, 2, columns, 32), _x(2, 2, columns, 32)
    places = np.arange(columns - length, columns)[:, None]
    seen = np.ones((length, columns), bool) if mask is None else np.arange(columns) <= places
    if mask == "window":
        seen &= np.arange(columns) > places - 20
    given = mx.array(np.broadcast_to(seen, (2, 1, length, columns))) if mask == "window" else mask
    wanted = np.empty(q.shape)
    for row in range(2):
        for head in range(4):
            a, b, c = (np.asarray(array, np.float64)[row] for array in (q, k, v))
            scores = np.where(seen, a[head] @ b[head // 2].T * 0.3, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            wanted[row, head] = weights @ c[head // 2] / weights.sum(-1, keepdims=True)
    _close(CpuProducts(2).attention(q, k, v, 0.3, given), wanted)


@pytest.mark.parametrize("cut", [2, 33, 256, 290])
def test_attention_in_chunks_has_the_bits_of_one(cut: int) -> None:
    products, (q, k, v) = CpuProducts(2), (_x(1, 4, 300, 32), _x(1, 2, 300, 32), _x(1, 2, 300, 32))
    whole = np.asarray(products.attention(q, k, v, 0.3, "causal"))
    first = products.attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], 0.3, "causal")
    second = products.attention(q[:, :, cut:], k, v, 0.3, "causal")
    assert np.array_equal(np.concatenate([np.asarray(first), np.asarray(second)], axis=2), whole)


def test_swiglu_of_any_gate() -> None:
    gate = mx.array([[-200.0, -3.0, 0.0, 3.0, 200.0]] * 3)
    up = mx.array([[1.0, 2.0, 3.0, 4.0, 5.0]] * 3)
    g, u = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    _close(CpuProducts(2).swiglu(gate, up, is_long=True), g / (1 + np.exp(-g)) * u)


@pytest.mark.parametrize(
    ("shape", "is_long"), [((1, 1, 2), False), ((64, 1, 2), False), ((1, 2, 2), True), ((64, 2, 2), True)]
)
def test_a_row_goes_to_blas_for_its_own_length_whatever_is_beside_it(shape: tuple[int, ...], *, is_long: bool) -> None:
    assert CpuProducts(2).sorts(shape, 8) is is_long
    assert CpuProducts(2).sorts(shape, 512) is is_long


def test_gpus_leave_everything_to_mlx() -> None:
    assert products_for(Device("metal", "M4", "applegpu_g16s")) is MLX
    assert isinstance(products_for(Device("cpu", "any", "")), CpuProducts)


def test_blas_has_its_threads_back_after_an_error() -> None:
    before = thread_count()
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        raise ZeroDivisionError
    thread_count.cache_clear()
    assert thread_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="numpy's wheels for other systems need not have OpenBLAS")
def test_the_variables_of_openblas_are_respected() -> None:
    code = "from mlx_mixtral.machine.processor import thread_count; print(thread_count())"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
