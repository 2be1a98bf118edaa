"""Scale and bias of every group by search: the format of ``mx.quantize``, with less error.

``w = s q + b`` with integer q. ``mx.quantize`` spreads s and b over a group's range; the best pair for the squared error
``sum_j m_j (w_j - s q_j - b)^2`` lies inside it. For a shrinking range the codes are found, then the pair that fits those codes
best (weighted least squares, closed form), then the codes that fit the pair; the best of all is refined in the same way. With
one bit a pair is two numbers, and the best are the means of the values below and above some point: all points are tried.

``m`` is the mean square of each input over a calibration text, 1 without one. Scale and bias are rounded to the type they are
stored in before codes are chosen and errors measured, and the bias is fitted to the scale as rounded: in bfloat16 an 8-bit
code's step is no larger than what rounding does to the bias. The pair of ``mx.quantize`` is the first candidate, so no group
ends up worse than with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.packing.codes import pack

__all__ = ["Groups", "codes_of", "search", "search_groups"]

# How far a group's range is drawn in: few codes gain from cutting off more of the tail.
_SHRINKS: dict[int, tuple[float, ...]] = {
    1: (),
    2: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.55),
    3: (0.95, 0.9, 0.85, 0.8, 0.75, 0.65),
    4: (0.95, 0.9, 0.85, 0.8),
}
_FEW_SHRINKS = (0.97, 0.93)
_REFINEMENTS = 3
# Weights worked on at once: what a core's cache holds on the CPU, what fills a GPU.
_BLOCK = {mx.DeviceType.cpu: 2**17, mx.DeviceType.gpu: 2**23}


@dataclass
class Groups:
    """Scale and bias ``[N, 1]`` in float32 (values their stored type holds) and weighted squared error ``[N, 1]``."""

    scales: mx.array
    biases: mx.array
    error: mx.array

    def keep_better(self, other: Groups) -> None:
        """Take over each group where ``other`` is better; an undefined one (NaN) never is."""
        better = other.error < self.error
        self.scales = mx.where(better, other.scales, self.scales)
        self.biases = mx.where(better, other.biases, self.biases)
        self.error = mx.where(better, other.error, self.error)


def codes_of(weights: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest codes, as whole float32 numbers."""
    return mx.clip(mx.round((weights - biases) / scales), 0, 2**bits - 1)


def search(weights: mx.array, spec: QuantizationSpec, importance: mx.array | None = None) -> dict[str, mx.array]:
    """Pack ``weights [rows, columns]`` of a float type; scales and biases are stored in that type.

    Args:
        importance: mean square of each input, ``[columns]`` float32; uniform when None.

    Returns:
        Evaluated ``weight`` (uint32), ``scales`` and ``biases``, as ``mx.quantize`` gives.
    """
    rows, columns = weights.shape
    step = max(1, _BLOCK[mx.default_device().type] // columns)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    for start in range(0, rows, step):
        part = _search_rows(weights[start : start + step], spec, importance)
        mx.eval(part)
        parts.append(part)
    joined = [mx.concatenate(list(fields)) if len(fields) > 1 else fields[0] for fields in zip(*parts, strict=True)]
    mx.eval(joined)
    return dict(zip(("weight", "scales", "biases"), joined, strict=True))


def _search_rows(
    weights: mx.array, spec: QuantizationSpec, importance: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    rows, columns = weights.shape
    best = search_groups(weights, spec, importance)
    values = weights.astype(mx.float32).reshape(-1, spec.group_size)
    codes = codes_of(values, best.scales, best.biases, spec.bits)
    shape = (rows, columns // spec.group_size)
    return (
        pack(codes.reshape(rows, columns), spec.bits),
        best.scales.reshape(shape).astype(weights.dtype),
        best.biases.reshape(shape).astype(weights.dtype),
    )


def search_groups(
    weights: mx.array, spec: QuantizationSpec, importance: mx.array | None = None, dtype: mx.Dtype | None = None
) -> Groups:
    """The best pair found for every group of ``weights [rows, columns]``, in row order.

    Args:
        dtype: type that scales and biases are stored in; that of ``weights`` when None.
    """
    dtype = weights.dtype if dtype is None else dtype
    _, scales, biases = mx.quantize(weights.astype(dtype), group_size=spec.group_size, bits=spec.bits)
    values = weights.astype(mx.float32).reshape(-1, spec.group_size)
    if importance is None:
        weight = mx.ones((1, spec.group_size))
    else:
        weight = mx.broadcast_to(importance.astype(mx.float32), weights.shape).reshape(values.shape)
    first = scales.reshape(-1, 1).astype(mx.float32), biases.reshape(-1, 1).astype(mx.float32)
    return _improve(values, weight, *first, spec.bits, dtype)


def _improve(
    values: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, dtype: mx.Dtype
) -> Groups:
    """From a first pair to the best found; ``values [N, g]``, ``weight [N or 1, g]``."""
    total = weight.sum(axis=-1, keepdims=True)

    def error_of(scales: mx.array, biases: mx.array) -> mx.array:
        codes = codes_of(values, scales, biases, bits)
        return (weight * mx.square(values - (scales * codes + biases))).sum(axis=-1, keepdims=True)

    def fitted(codes: mx.array) -> Groups:
        # Weighted least squares of values = s codes + b, centred: with 8 bits the plain sums would cancel.
        code, value = (weight * codes).sum(-1, keepdims=True) / total, (weight * values).sum(-1, keepdims=True) / total
        centred = weight * (codes - code)
        s = (centred * (values - value)).sum(-1, keepdims=True) / (centred * (codes - code)).sum(-1, keepdims=True)
        s = s.astype(dtype).astype(mx.float32)
        b = (value - s * code).astype(dtype).astype(mx.float32)
        return Groups(s, b, error_of(s, b))

    best = Groups(scales, biases, error_of(scales, biases))
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    if bits == 1:
        best.keep_better(fitted(_two_sides(values, weight)))
    for shrink in (1.0, *_SHRINKS.get(bits, _FEW_SHRINKS)):
        step = (high - low) * (shrink / (2**bits - 1))
        best.keep_better(fitted(codes_of(values, step, low * shrink, bits)))
    for _ in range(_REFINEMENTS):
        best.keep_better(fitted(codes_of(values, best.scales, best.biases, bits)))
    return best


def _two_sides(values: mx.array, weight: mx.array) -> mx.array:
    """Codes 0 below and 1 above the point where both sides' means lose least; ``values [N, g]``, ``weight [N or 1, g]``."""
    order = mx.argsort(values, axis=-1)
    ascending = mx.take_along_axis(values, order, axis=-1)
    weight = mx.take_along_axis(mx.broadcast_to(weight, values.shape), order, axis=-1)
    total = weight.sum(axis=-1, keepdims=True)
    mean = (weight * ascending).sum(axis=-1, keepdims=True) / total
    below, moment = mx.cumsum(weight, axis=-1), mx.cumsum(weight * (ascending - mean), axis=-1)
    # What two means have less of the squared error than one, but for the factor ``total``.
    gain = mx.square(moment) / (below * (total - below))
    gain = mx.where((below > 0) & (below < total), gain, 0)[:, :-1]
    edge = mx.take_along_axis(ascending, gain.argmax(axis=-1, keepdims=True), axis=-1)
    return (values > edge).astype(mx.float32)
