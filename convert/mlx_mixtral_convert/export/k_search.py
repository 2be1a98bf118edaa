"""Integers for GGUF's K-quants by search: the scales of a super-block together, for the least squared error.

A super-block is 256 weights of a row in groups of 16 or 32. A group has a small integer for its scale, and in some types one
for an offset below zero; two float16 numbers of the super-block turn those into floats (block_q2_K to block_q6_K of
ggml-common.h in ggml-org/llama.cpp):

    with minima      w = (d scale) q - (dmin minimum)      Q2_K, Q4_K, Q5_K
    without          w = (d scale) q                       Q3_K, Q6_K, q and scale with a sign

What is minimised is ``sum_j m_j (w_j - ŵ_j)^2``, ``m`` the mean square of each input over a calibration text, 1 without one:

1. For each group alone, codes at several steps, and for each the real scale and offset that fit them best, in closed form.
2. ``d`` and ``dmin`` from the largest of these, and the integers nearest to them.
3. In turn: the codes, then the integers that fit these codes best, then ``d`` and ``dmin`` by least squares over the
   super-block. Each of the three lowers the error or leaves it.
4. The codes anew for the integers beside those found: the third step holds one of the two still, and ends where neither alone
   gains.

5. ``d`` and ``dmin`` times what makes ``sum_j m_j w_j ŵ_j`` that of the weights themselves. The least squared error is had with
   numbers that are a little too small, by the share of it, and in every matrix alike: the outputs of a layer would shrink with
   it, by 7% in two bits. The other parts of an error cancel, this one adds up.

   The step adds to the squared error: three bits with importance take two thirds of it. Beyond three bits there is too little
   to mend.

Blocks of 32 weights with no integers but their codes (Q4_0, Q5_0; with an offset of either sign Q4_1, Q5_1) go the same way
without the second, fourth and fifth step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KType", "SuperBlocks", "search"]

Floats = npt.NDArray[np.float32]

_ROUNDS = 2
# Steps from a pair of integers to those beside it.
_AROUND = ((-1, 0), (1, 0), (0, -1), (0, 1))
# The smallest step of float16, and its largest number.
_TINY, _LARGE = np.float32(2.0**-24), np.float32(65504)


@dataclass(frozen=True)
class KType:
    """How a super-block of ``groups * group`` weights is coded.

    Args:
        group: weights that share a scale.
        groups: of a super-block.
        codes: lowest and highest q.
        scales: lowest and highest integer that ``d`` multiplies; of minima, from 0 to the same highest. None: always 1.
        has_min: whether there is an offset.
        starts: what the widest step and the lowest weight of a group are multiplied by for the codes of the first step; a
            negative one turns the codes around.
        unshrink: how much of the fifth step is taken, without importance and with it.
    """

    group: int
    groups: int
    codes: tuple[int, int]
    scales: tuple[int, int] | None
    has_min: bool
    starts: tuple[tuple[float, float], ...]
    unshrink: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class SuperBlocks:
    """``d``, ``dmin`` float32 ``[n]`` (values float16 holds); int8 ``scales`` and ``minima`` ``[n, groups]``, ``codes``
    ``[n, groups, group]``."""

    d: Floats
    dmin: Floats
    scales: npt.NDArray[np.int8]
    minima: npt.NDArray[np.int8]
    codes: npt.NDArray[np.int8]


def search(weights: Floats, kind: KType, importance: Floats | None = None) -> SuperBlocks:
    """Code rows ``[rows, columns]``, columns a multiple of a super-block, with ``importance [columns]`` of each input.

    Zeros come out as zeros. Deterministic: the same numbers give the same integers.
    """
    return _Search(weights, kind, importance).run()


@dataclass(frozen=True)
class _Numbers:
    """What is stored beside the codes: ``d``, ``dmin`` of each super-block, integers of each group as whole float32 numbers."""

    d: Floats
    dmin: Floats
    scales: Floats
    minima: Floats

    @property
    def scale(self) -> Floats:
        """What each group's codes are multiplied by."""
        return np.repeat(self.d, len(self.scales) // len(self.d)) * self.scales

    @property
    def offset(self) -> Floats:
        """What is added to that."""
        return -np.repeat(self.dmin, len(self.minima) // len(self.dmin)) * self.minima

    def with_integers(self, scales: Floats, minima: Floats) -> _Numbers:
        return _Numbers(self.d, self.dmin, scales, minima)


@dataclass(frozen=True)
class _Fit:
    """Sums over each group, for some codes: ``m q``, ``m q^2``, ``m q w``."""

    q: Floats
    qq: Floats
    qw: Floats


class _Search:
    """Arrays ``[group, n * groups]``: sums over a group run along the first axis, which numpy adds up whole rows at a time."""

    def __init__(self, weights: Floats, kind: KType, importance: Floats | None) -> None:
        self.kind = kind
        rows = len(weights)
        self.w = np.ascontiguousarray(weights.reshape(-1, kind.group).T)
        self.m: Floats | None = None
        if importance is not None:
            # Relative, and never zero: a group must have a weight to be divided by.
            relative = np.maximum(importance / importance.mean(), np.float32(1e-6)).astype(np.float32)
            self.m = np.tile(np.ascontiguousarray(relative.reshape(-1, kind.group).T), (1, rows))
        weighted = self.w if self.m is None else self.m * self.w
        self.mw = weighted
        self.sum_m: Floats = np.full(self.w.shape[1], kind.group, np.float32) if self.m is None else self.m.sum(0)
        self.sum_w: Floats = weighted.sum(0)
        self.sum_ww: Floats = np.einsum("ig,ig->g", weighted, self.w)
        self.q, self.scratch = np.empty_like(self.w), np.empty_like(self.w)

    def run(self) -> SuperBlocks:
        # A group of zeros divides by zero on the way to a scale of zero.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            at = self._integers(*self._groups())
            for _ in range(_ROUNDS):
                at = self._improve(at)
            if self.kind.scales is not None:
                at = self._improve(self._best_neighbour(at))
            codes = self._codes(at.scale, at.offset)
            if any(self.kind.unshrink):
                at = self._unshrunk(self._fit(codes), at)
        shape = (len(at.d), self.kind.groups)
        return SuperBlocks(
            at.d,
            at.dmin,
            at.scales.reshape(shape).astype(np.int8),
            at.minima.reshape(shape).astype(np.int8),
            np.ascontiguousarray(codes.T).astype(np.int8).reshape(*shape, self.kind.group),
        )

    def _improve(self, at: _Numbers) -> _Numbers:
        """The third step once."""
        fit = self._fit(self._codes(at.scale, at.offset))
        return self._least_squares(fit, at if self.kind.scales is None else self._fitting(fit, at))

    def _unshrunk(self, fit: _Fit, at: _Numbers) -> _Numbers:
        """The fifth step."""
        along = self._blocks(at.scale * fit.qw + at.offset * self.sum_w).sum(1)
        factor = np.where(along > 0, self._blocks(self.sum_ww).sum(1) / along, np.float32(1))
        factor = 1 + np.float32(self.kind.unshrink[self.m is not None]) * (factor - 1)
        return _Numbers(_half(at.d * factor), _half(at.dmin * factor), at.scales, at.minima)

    def _codes(self, scale: Floats, offset: Floats) -> Floats:
        """The nearest codes as whole float32 numbers, in memory that the next call writes over."""
        inverse = np.where(scale == 0, np.float32(0), 1 / scale)
        if self.kind.has_min:
            np.subtract(self.w, offset, out=self.q)
            np.multiply(self.q, inverse, out=self.q)
        else:
            np.multiply(self.w, inverse, out=self.q)
        np.rint(self.q, out=self.q)
        np.clip(self.q, *self.kind.codes, out=self.q)
        return self.q

    def _fit(self, codes: Floats) -> _Fit:
        weighted = codes
        if self.m is not None:
            weighted = np.multiply(self.m, codes, out=self.scratch)
        return _Fit(
            weighted.sum(0) if self.kind.has_min else self.sum_w,
            np.einsum("ig,ig->g", weighted, codes),
            np.einsum("ig,ig->g", self.mw, codes),
        )

    def _error(self, fit: _Fit, scale: Floats, offset: Floats) -> Floats:
        error: Floats = self.sum_ww + scale * (scale * fit.qq - 2 * fit.qw)
        if self.kind.has_min:
            error += offset * (offset * self.sum_m - 2 * self.sum_w + 2 * scale * fit.q)
        return error

    def _real(self, fit: _Fit) -> tuple[Floats, Floats]:
        """The scale and offset that fit codes best, the offset not above zero where the type has integers for it."""
        alone = np.where(fit.qq > 0, fit.qw / fit.qq, np.float32(0))
        if not self.kind.has_min:
            return alone, np.zeros_like(alone)
        mean_q, mean_w = fit.q / self.sum_m, self.sum_w / self.sum_m
        spread = fit.qq - mean_q * fit.q
        scale = np.where(spread > 1e-6 * fit.qq, (fit.qw - mean_w * fit.q) / spread, np.float32(0))
        offset = mean_w - scale * mean_q
        if self.kind.scales is None:
            return scale, offset
        one_sided = (offset > 0) | (scale < 0)
        return np.where(one_sided, alone, scale), np.where(one_sided, np.float32(0), offset)

    def _groups(self) -> tuple[Floats, Floats]:
        """The first step."""
        low, high = self.kind.codes
        if self.kind.has_min:
            bottom = self.w.min(0) if self.kind.scales is None else np.minimum(self.w.min(0), 0)
            step = (self.w.max(0) - bottom) / (high - low)
        else:
            # The largest weight gets the code of largest magnitude, whatever its sign.
            top, under = self.w.max(0), self.w.min(0)
            step, bottom = np.where(top > -under, top, under) / low, np.zeros_like(top)
        scale, offset = np.zeros_like(step), np.zeros_like(step)
        best = self.sum_ww.copy()
        for start in (*self.kind.starts, None, None):
            # At last from the best so far: its codes, and the pair that fits them.
            at = (scale, offset) if start is None else (step * np.float32(start[0]), bottom * np.float32(start[1]))
            fit = self._fit(self._codes(*at))
            pair = self._real(fit)
            error = self._error(fit, *pair)
            better = error < best
            best = np.where(better, error, best)
            scale, offset = (np.where(better, new, old) for new, old in zip(pair, (scale, offset), strict=True))
        return scale, offset

    def _blocks(self, of_groups: Floats) -> Floats:
        return of_groups.reshape(-1, self.kind.groups)

    def _integers(self, scale: Floats, offset: Floats) -> _Numbers:
        """The second step."""
        if self.kind.scales is None:
            ones = np.ones_like(scale)
            return _Numbers(_half(scale), _half(-offset), ones, ones)
        low, high = self.kind.scales
        by_block = self._blocks(scale)
        if low < 0:
            largest = np.take_along_axis(by_block, np.abs(by_block).argmax(1)[:, None], axis=1)[:, 0]
            d = _half(largest / low)
        else:
            d = _half(by_block.max(1) / high)
        dmin = _half(-self._blocks(offset).min(1) / high)
        return _Numbers(d, dmin, self._nearest(scale, d, low), self._nearest(-offset, dmin, 0))

    def _nearest(self, value: Floats, unit: Floats, low: int) -> Floats:
        assert self.kind.scales is not None
        each = np.repeat(unit, self.kind.groups)
        whole: Floats = np.where(each == 0, np.float32(0), np.rint(value / each))
        return np.clip(whole, low, self.kind.scales[1])

    def _fitting(self, fit: _Fit, at: _Numbers) -> _Numbers:
        """Integers for these codes: no worse than those there are."""
        assert self.kind.scales is not None
        low, high = self.kind.scales
        centre = self._nearest(self._real(fit)[0], at.d, low)
        best, error = at, self._error(fit, at.scale, at.offset)
        for by in (0, -1, 1) if self.kind.has_min else (0,):
            tried = at.with_integers(np.clip(centre + np.float32(by), low, high), at.minima)
            if self.kind.has_min:
                under = (tried.scale * fit.q - self.sum_w) / self.sum_m
                tried = at.with_integers(tried.scales, self._nearest(under, at.dmin, 0))
            best, error = _better(best, error, tried, self._error(fit, tried.scale, tried.offset))
        return best

    def _least_squares(self, fit: _Fit, at: _Numbers) -> _Numbers:
        """d and dmin for these codes and integers, as float16: no worse than those there are."""

        def total(of_groups: Floats) -> npt.NDArray[np.float64]:
            sums: npt.NDArray[np.float64] = self._blocks(of_groups).sum(1, dtype=np.float64)
            return sums

        a, p = total(at.scales * at.scales * fit.qq), total(at.scales * fit.qw)
        d, dmin = p / a, at.dmin
        if self.kind.has_min:
            b, c = -total(at.scales * at.minima * fit.q), total(at.minima * at.minima * self.sum_m)
            r = -total(at.minima * self.sum_w)
            determinant = a * c - b * b
            solvable = determinant > 1e-9 * a * c
            d = np.where(solvable, (p * c - b * r) / determinant, d)
            dmin = _half(np.where(solvable, (a * r - b * p) / determinant, dmin))
            if self.kind.scales is not None:
                dmin = np.where(dmin >= 0, dmin, at.dmin)
        new = _Numbers(_half(np.where(np.isfinite(d), d, at.d)), dmin, at.scales, at.minima)
        wins = total(self._error(fit, new.scale, new.offset)) < total(self._error(fit, at.scale, at.offset))
        return _Numbers(np.where(wins, new.d, at.d), np.where(wins, new.dmin, at.dmin), at.scales, at.minima)

    def _best_neighbour(self, at: _Numbers) -> _Numbers:
        """The fourth step."""
        assert self.kind.scales is not None
        low, high = self.kind.scales
        best, error = at, self._error(self._fit(self._codes(at.scale, at.offset)), at.scale, at.offset)
        for by, under_by in _AROUND if self.kind.has_min else _AROUND[:2]:
            tried = at.with_integers(
                np.clip(at.scales + np.float32(by), low, high), np.clip(at.minima + np.float32(under_by), 0, high)
            )
            fit = self._fit(self._codes(tried.scale, tried.offset))
            best, error = _better(best, error, tried, self._error(fit, tried.scale, tried.offset))
        return best


def _better(best: _Numbers, error: Floats, tried: _Numbers, its_error: Floats) -> tuple[_Numbers, Floats]:
    """Group by group the integers with the smaller error, and that error."""
    wins = its_error < error
    scales, minima = np.where(wins, tried.scales, best.scales), np.where(wins, tried.minima, best.minima)
    return best.with_integers(scales, minima), np.where(wins, its_error, error)


def _half(values: npt.NDArray[np.floating[Any]]) -> Floats:
    """The nearest numbers of float16, none rounded to infinity, none but zero to zero."""
    kept: Floats = np.clip(values, -_LARGE, _LARGE).astype(np.float16).astype(np.float32)
    return np.where((kept == 0) & (values != 0), np.copysign(_TINY, values).astype(np.float32), kept)
