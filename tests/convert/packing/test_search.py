"""Searched scales: the format of ``mx.quantize``, never more error, less where there is less to be had."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.config.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantizationSpec
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.packing import search as module
from mlx_mixtral_convert.packing.codes import pack
from mlx_mixtral_convert.packing.quantize import quantize
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.rounding import Search

Floats = npt.NDArray[np.float32]
TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def restored(packed: dict[str, mx.array], spec: QuantizationSpec) -> Floats:
    scales, biases = packed["scales"].astype(mx.float32), packed["biases"].astype(mx.float32)
    return np.array(mx.dequantize(packed["weight"], scales, biases, spec.group_size, spec.bits))


def group_errors(
    weights: mx.array, packed: dict[str, mx.array], spec: QuantizationSpec, importance: Floats | None = None
) -> Floats:
    """Weighted squared error of every group, in numpy from MLX's own dequantisation."""
    difference = (np.array(weights.astype(mx.float32)).astype(np.float64) - restored(packed, spec)) ** 2
    if importance is not None:
        difference *= importance
    return difference.reshape(len(difference), -1, spec.group_size).sum(axis=-1).astype(np.float32)


def plain(weights: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]:
    fields = mx.quantize(weights, group_size=spec.group_size, bits=spec.bits)
    return dict(zip(("weight", "scales", "biases"), fields, strict=True))


def random_weights(seed: int, rows: int = 24, columns: int = 256, kind: str = "BF16") -> mx.array:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.03
    return mx.array(values).astype(TYPES[kind])


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_are_packed_as_mlx_unpacks_them(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 128)).astype(np.uint32)
    ones, zeros = mx.ones((5, 2)), mx.zeros((5, 2))
    assert np.array_equal(np.array(mx.dequantize(pack(mx.array(codes), bits), ones, zeros, 64, bits)), codes)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("group", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_no_group_is_worse_than_with_mx_quantize(bits: int, group: int, kind: str) -> None:
    spec, weights = QuantizationSpec(bits, group), random_weights(bits, kind=kind)
    importance = np.random.default_rng(1).gamma(0.5, size=256).astype(np.float32)
    for weight in (None, importance):
        found = search(weights, spec, None if weight is None else mx.array(weight))
        assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
            name: (a.shape, a.dtype) for name, a in plain(weights, spec).items()
        }
        ours, theirs = (
            group_errors(weights, found, spec, weight),
            group_errors(weights, plain(weights, spec), spec, weight),
        )
        assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()
        assert ours.sum() < 0.97 * theirs.sum() or (bits == 8 and kind == "F32")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(AFFINE_BITS),
    st.sampled_from(sorted(TYPES)),
    st.sampled_from([1e-4, 1.0, 300.0]),
    st.floats(0, 3),
    st.sampled_from(["normal", "constant", "one outlier", "two values", "zeros"]),
)
def test_whatever_the_weights_no_group_is_worse(
    seed: int, bits: int, kind: str, size: float, offset: float, shape: str
) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal((4, 128)).astype(np.float32)
    if shape == "constant":
        values[:] = values[:, :1]
    elif shape == "one outlier":
        values[:, 3] *= 50
    elif shape == "two values":
        values = np.sign(values)
    elif shape == "zeros":
        values[:, :64] = 0
    spec, weights = QuantizationSpec(bits, 64), mx.array((values + offset) * size).astype(TYPES[kind])
    theirs = plain(weights, spec)
    ours = search(weights, spec)
    assert mx.isfinite(ours["scales"]).all()
    scale = float(np.abs(np.array(weights.astype(mx.float32))).max()) ** 2
    assert (group_errors(weights, ours, spec) <= group_errors(weights, theirs, spec) * (1 + 1e-5) + 1e-12 * scale).all()


def test_four_bits_lose_a_sixth_less_and_two_bits_a_third() -> None:
    for bits, most in ((2, 0.72), (3, 0.80), (4, 0.86)):
        spec, weights = QuantizationSpec(bits, 64), random_weights(9, 64, 1024)
        ours, theirs = (group_errors(weights, packed, spec) for packed in (search(weights, spec), plain(weights, spec)))
        assert ours.sum() < most * theirs.sum()


def test_an_important_input_is_rounded_better() -> None:
    spec, weights = QuantizationSpec(3, 64), random_weights(3)
    importance = np.ones(256, np.float32)
    importance[::16] = 100
    flat = (np.array(weights.astype(mx.float32)) - restored(search(weights, spec), spec))[:, ::16]
    led = (np.array(weights.astype(mx.float32)) - restored(search(weights, spec, mx.array(importance)), spec))[:, ::16]
    assert np.square(led).sum() < 0.5 * np.square(flat).sum()


def test_the_rows_of_a_block_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights = QuantizationSpec(4, 64), random_weights(4, rows=37)
    whole = search(weights, spec)
    monkeypatch.setattr(module, "_BLOCK", dict.fromkeys(module._BLOCK, 256 * 5))
    parts = search(weights, spec)
    assert all(mx.array_equal(whole[name], parts[name]) for name in whole)


def test_scales_that_overflow_their_type_are_an_error_as_without_search() -> None:
    values = np.full((4, 64), 3e38, np.float32)
    values[:, ::2] *= -1
    spec = QuantizationSpec(2, 64)
    messages = []
    for rounding in (None, lambda weights: search(weights, spec)):
        with pytest.raises(ConversionError) as caught:
            quantize(Values(values, "F32"), spec, "w", None, rounding)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "overflow" in messages[0]


def test_search_without_calibration_weighs_all_inputs_alike() -> None:
    from mlx_mixtral.config.layout import Matrix

    spec, weights = QuantizationSpec(4, 64), random_weights(5)
    found = Search().pack(Matrix("lm_head", "head", 24, 256), 0, weights, spec)
    assert all(mx.array_equal(found[name], array) for name, array in search(weights, spec).items())


@pytest.mark.parametrize(("bits", "kind"), [(8, "BF16"), (6, "BF16"), (8, "F16"), (4, "BF16")])
def test_the_bias_is_fitted_to_the_scale_as_it_is_stored(bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fit alone, again in float64: least squares for the codes over a group's whole range, the scale rounded first."""
    monkeypatch.setattr(module, "_SHRINKS", {})
    monkeypatch.setattr(module, "_FEW_SHRINKS", ())
    monkeypatch.setattr(module, "_REFINEMENTS", 0)
    spec, weights = QuantizationSpec(bits, 64), random_weights(bits + 20, 64, 1024, kind)
    found, first = search(weights, spec), plain(weights, spec)
    values = float64(weights).reshape(-1, 64)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    codes = np.clip(np.rint((values - low) / ((high - low) / (2**bits - 1))), 0, 2**bits - 1)
    centred = codes - codes.mean(axis=1, keepdims=True)
    scales = (centred * values).sum(axis=1) / (centred * codes).sum(axis=1)
    stored = float64(mx.array(scales).astype(TYPES[kind]))
    biases = float64(mx.array(values.mean(axis=1) - stored * codes.mean(axis=1)).astype(TYPES[kind]))
    fitted = (float64(found["scales"]) != float64(first["scales"])).reshape(-1)
    assert fitted.sum() > 100
    # A code at the edge of two, or a sum at the edge of two numbers of the type, may fall to the other side.
    same = (float64(found["scales"]).reshape(-1) == stored) & (float64(found["biases"]).reshape(-1) == biases)
    assert same[fitted].mean() > 0.97


def float64(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def test_refining_lowers_the_error_of_what_ranges_alone_find(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, most in ((2, 0.998), (3, 0.998), (4, 0.998)):
        spec, weights = QuantizationSpec(bits, 64), random_weights(bits + 30, 64, 1024)
        refined = group_errors(weights, search(weights, spec), spec)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_REFINEMENTS", 0)
            unrefined = group_errors(weights, search(weights, spec), spec)
        assert (refined <= unrefined * (1 + 1e-5)).all()
        assert refined.sum() < most * unrefined.sum()


@pytest.mark.parametrize("group", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("shape", ["normal", "long tails", "far from zero", "unimportant inputs"])
def test_one_bit_is_the_best_of_all_splits_of_a_group(group: int, shape: str) -> None:
    """Against every way to cut a sorted group in two, each part at its weighted mean, in float64."""
    random = np.random.default_rng(group)
    values = random.standard_t(3, (8, 256)) if shape == "long tails" else random.standard_normal((8, 256))
    values = (values + (5 if shape == "far from zero" else 0)).astype(np.float32)
    importance = random.gamma(0.3, size=256).astype(np.float32)
    if shape == "unimportant inputs":
        importance[::3] = 0
    spec = QuantizationSpec(1, group)
    found = group_errors(mx.array(values), search(mx.array(values), spec, mx.array(importance)), spec, importance)
    least = np.full(found.shape, np.inf)
    for row, at in np.ndindex(found.shape):
        w, m = (a[at * group : (at + 1) * group].astype(np.float64) for a in (values[row], importance))
        for edge in np.sort(w)[:-1]:
            parts = (w <= edge, w > edge)
            errors = [m[p] @ (w[p] - np.average(w[p], weights=m[p])) ** 2 for p in parts if m[p].sum()]
            least[row, at] = min(least[row, at], sum(errors))
    np.testing.assert_allclose(found, least, rtol=1e-4)
