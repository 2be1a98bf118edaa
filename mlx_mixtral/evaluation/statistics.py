"""Means over tokens with their standard errors; perplexity, bits per byte, KL divergence."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_TOKENS", "Mean", "kl_divergence", "mean_of", "with_error"]

BLOCK_TOKENS = 64
MIN_BLOCKS = 32

Floats = npt.NDArray[np.floating]


class Mean(NamedTuple):
    """A mean and its standard error; NaN for a single value."""

    value: float
    stderr: float


def mean_of(values: Floats, blocks: npt.NDArray[np.int64]) -> Mean:
    """Mean of one value a token, summed in float64, and its standard error.

    Tokens that stand close together are hard or easy together, so the error is that of whole blocks (``BLOCK_TOKENS``
    consecutive tokens of a text): with G blocks, N values and s_g the sum of deviations from the mean in block g it is
    ``sqrt(G / (G - 1) * sum(s_g ** 2)) / N``. With fewer than 32 blocks each token is its own, which is the usual formula.

    Args:
        blocks: ``[N]`` number of the block each value belongs to, ascending.
    """
    x = np.asarray(values, np.float64)
    value = float(x.mean())
    deviations, count = x - value, len(x)
    starts = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
    if len(starts) >= MIN_BLOCKS:
        deviations = np.add.reduceat(deviations, starts)
    groups = len(deviations)
    if groups < 2:
        return Mean(value, float("nan"))
    return Mean(value, float(np.sqrt(groups / (groups - 1) * np.square(deviations).sum()) / count))


def kl_divergence(top: Floats, rest: Floats, other_top: Floats, other_rest: Floats) -> npt.NDArray[np.float64]:
    """``[n]``: KL(p || q) in nats, of K named tokens and one bucket for all others.

    ``top [n, K]`` and ``rest [n]`` are log-probabilities of p, the other two of q, for the same tokens. Merging tokens
    into a bucket never raises KL (the log-sum inequality), so this is a lower bound, and exact where K is all of them.
    """
    p, q = np.asarray(top, np.float64), np.asarray(other_top, np.float64)
    named = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(axis=-1)
    p_rest, q_rest = np.asarray(rest, np.float64), np.asarray(other_rest, np.float64)
    with np.errstate(invalid="ignore"):
        others = np.where(p_rest > -np.inf, np.exp(p_rest) * (p_rest - q_rest), 0.0)
    # Rounding can make a distance of nothing negative.
    return np.asarray(np.maximum(named + others, 0.0))


def with_error(value: float, error: float) -> str:
    """``26.6 ± 3.1``: two figures of the error, and the value as far."""
    if not math.isfinite(error) or error == 0:
        return f"{value:.4g}"
    digits = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
