"""Rope scaling of GGUF files: by keys, or as tensors of what each frequency is divided by.

    rope_freqs.weight                       [head_dim / 2], for every length: how llama.cpp holds Llama 3's scaling
    rope_factors_{long,short}.weight        the same past the original context, and up to it: longrope

https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.rope import RopeConfig
from mlx_mixtral.errors import ConfigError

__all__ = ["ROPE_TENSORS", "scaling_of_factors"]

Floats = npt.NDArray[np.float32]

ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# Where the keys of a Llama 3 are, as far as they can be told apart: multiples of all three give the same frequencies.
_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = tuple(2**power for power in range(1, 21))
# Divisors are quotients of two float32: what rounding leaves between equal ones.
_CLOSE = 1e-6


def scaling_of_factors(
    declared: Mapping[str, Any] | None,
    tensors: Mapping[str, Floats],
    theta: float,
    context: int,
    attention_factor: float,
) -> Mapping[str, Any] | None:
    """``rope_scaling`` of config.json for a file with rope tensors; ``declared`` is what its keys say.

    Llama 3's parameters are found again where they give these divisors; else they become longrope, whose divisors may be any.

    Raises:
        ConfigError: tensors and keys that do not go together, or a divisor that is not positive and finite.
    """
    for name, factors in tensors.items():
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ConfigError(
                f"tensor '{name}.weight' holds a divisor that is not a positive number; the file is damaged"
            )
    kind = None if declared is None else declared["rope_type"]
    long, short = tensors.get("rope_factors_long"), tensors.get("rope_factors_short")
    if long is not None or short is not None:
        if long is None or short is None or kind not in (None, "longrope"):
            raise ConfigError(
                f"rope_factors_long and rope_factors_short belong together, and do not apply to {kind or 'one of them alone'}"
            )
        original = None if declared is None else declared.get("original_max_position_embeddings")
        return _longrope(long, short, original or context, attention_factor)
    factors = tensors.get("rope_freqs", np.ones(1, np.float32))
    if (factors == 1).all() and kind != "longrope":
        return declared
    if kind == "linear":
        assert declared is not None
        factors = factors * np.float32(declared["factor"])
    elif kind is not None:
        raise ConfigError(
            f"tensor 'rope_freqs.weight' scales the rotary frequencies, and rope.scaling.type {kind!r} does too"
        )
    return _llama3(factors, theta, context) or _longrope(factors, factors, context, 1.0)


def _longrope(long: Floats, short: Floats, original: int, attention_factor: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": [float(factor) for factor in long],
        "short_factor": [float(factor) for factor in short],
        "factor": 1.0,
        "attention_factor": attention_factor,
        "original_max_position_embeddings": original,
    }


def _llama3(factors: Floats, theta: float, context: int) -> dict[str, Any] | None:
    """Parameters that give these divisors: low_freq_factor is 1, for nothing tells it from its multiples."""
    plain = RopeConfig(theta, context).inverse_frequencies(2 * len(factors), 1)
    for high, original in _candidates(factors.astype(np.float64), plain.astype(np.float64)):
        scaling = {
            "rope_type": "llama3",
            "factor": float(f"{factors.max():.6g}"),
            "low_freq_factor": _LOW,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if not (high > _LOW and original > 0):
            continue
        found = RopeConfig.from_hf({"rope_scaling": scaling}, theta, context).inverse_frequencies(2 * len(factors), 1)
        if np.allclose(plain / found, factors, rtol=_CLOSE, atol=0):
            return scaling
    return None


def _candidates(factors: npt.NDArray[np.float64], plain: npt.NDArray[np.float64]) -> Iterator[tuple[float, int]]:
    """High frequency factors and original contexts to try."""
    largest = factors.max()
    if largest <= 1:
        return
    # Between 1 and the largest, 1 / factor goes in a line with the frequency: share = turns * steep - start.
    share = (1 / factors - 1 / largest) / (1 - 1 / largest)
    turns = plain / (2 * np.pi)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() > 1:
        steep, start = np.polyfit(turns[between], share[between], 1) * (1, -1)
        if steep > 0 and start > 0:
            yield round(_LOW * (1 + 1 / start), 3), round(_LOW * steep / start)
    if between.sum() == 1:
        yield _HIGH, round(float(((share * (_HIGH - _LOW) + _LOW) / turns)[between][0]))
    for original in _ORIGINALS:
        yield _HIGH, original
