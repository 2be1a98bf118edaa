"""Rotary position embeddings: the base, the scaling kinds of the family, and the frequencies they give.

Formulas follow ``modeling_rope_utils.py`` of transformers 5.23, which is what checkpoints with these keys were tuned on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import is_number
from mlx_mixtral.errors import ConfigError

__all__ = ["EXTENDING_KINDS", "MAX_CONTEXT_TOKENS", "MAX_FACTOR", "RopeConfig"]

MAX_CONTEXT_TOKENS = 2**24
"""More than any model has: a count from a stranger's file is bounded."""
EXTENDING_KINDS = ("yarn", "linear", "dynamic")
"""Kinds that a factor alone describes."""
MAX_FACTOR = 1024
"""That is given on the command line."""

Floats = npt.NDArray[np.float32]

_ALIASES = {"su": "longrope"}
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Keys a kind reads; the required ones first.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("long_factor", "short_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_ALWAYS = {"rope_theta", "rope_type", "type", "original_max_position_embeddings", "partial_rotary_factor", "finetuned"}


# What checkpoints say lies far within; beyond, frequencies overflow float32 or no position differs from the next.
MAX_THETA = 1e12
MIN_NUMBER, MAX_NUMBER = 1e-3, 1e6


@dataclass(frozen=True)
class RopeConfig:
    """Base ``theta``, the scaling ``kind``, and the parameters that kind reads.

    ``max_position_embeddings`` and ``original_max_position_embeddings`` are in tokens; the second is what the model was
    pretrained with and defaults to the first.
    """

    theta: float
    max_position_embeddings: int
    kind: str = "default"
    original_max_position_embeddings: int | None = None
    parameters: Mapping[str, Any] | None = None

    @classmethod
    def from_hf(cls, entries: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
        """Read ``rope_theta``, ``rope_scaling`` (``type`` or ``rope_type``) or the newer ``rope_parameters``.

        Raises:
            ConfigError: an unknown kind, or a parameter that is missing, malformed or not known to that kind.
        """
        # Where a file has both, transformers lets the older key replace the newer one.
        scaling = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping):
            raise ConfigError(f"config.json: rope_parameters is {scaling!r}, not an object")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in _KINDS:
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported; supported kinds are {', '.join(_KINDS)}"
            )
        known = {*_REQUIRED.get(kind, ()), *_OPTIONAL.get(kind, ())}
        for key in _REQUIRED.get(kind, ()):
            if scaling.get(key) is None:
                raise ConfigError(f"config.json: rope scaling {kind!r} needs {key!r}")
        for key, value in scaling.items():
            if key not in known | _ALWAYS and value is not None and kind != "default":
                raise ConfigError(f"config.json: rope scaling {kind!r} with {key} = {value!r} is not supported")
            if key == "partial_rotary_factor" and value not in (None, 1, 1.0):
                raise ConfigError(f"config.json: partial_rotary_factor = {value!r} is not supported")
        theta = scaling.get("rope_theta")
        if theta is None:
            theta = entries.get("rope_theta")
        if theta is None:
            theta = default_theta
        original = entries.get("original_max_position_embeddings")
        if original is None:
            original = scaling.get("original_max_position_embeddings")
        if original is not None:
            original = int(_number("original_max_position_embeddings", original, 1, 2**24))
        parameters = {key: scaling[key] for key in known if scaling.get(key) is not None}
        for key, value in parameters.items():
            for number in value if key in ("long_factor", "short_factor") and isinstance(value, list) else [value]:
                if key != "truncate" and not (key.startswith("mscale") and number == 0):
                    _number(key, number, MIN_NUMBER, MAX_NUMBER)
        theta = _number("rope_theta", theta, 1, MAX_THETA)
        # Values at which a formula divides by zero.
        if kind == "yarn" and theta == 1:
            raise ConfigError("config.json: rope scaling 'yarn' needs a rope_theta other than 1")
        if kind == "longrope" and (original or max_position_embeddings) == 1:
            raise ConfigError("config.json: rope scaling 'longrope' needs original_max_position_embeddings above 1")
        if kind == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
            raise ConfigError("config.json: rope scaling 'llama3' needs low_freq_factor and high_freq_factor to differ")
        return cls(theta, max_position_embeddings, kind, original, parameters)

    def check(self, dims: int) -> None:
        """Raise ConfigError unless the frequencies of heads of ``dims`` are numbers that a model can have."""
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                found = [self.inverse_frequencies(dims, length) for length in (1, self.max_position_embeddings)]
            sound = all(np.isfinite(each).all() and (each > 0).all() for each in found)
            sound = sound and 0 < self.attention_factor() < math.inf
        except ArithmeticError:
            sound = False
        if not sound:
            raise ConfigError(
                f"config: rope_theta {self.theta:g} and rope scaling {self.kind!r} give no valid frequencies "
                f"for heads of {dims}; check rope_scaling"
            )

    @property
    def original(self) -> int:
        """Context the model was pretrained with, in tokens."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def max_context_tokens(self) -> int:
        """Tokens the scaled embedding reaches.

        ``factor`` multiplies the pretrained context, and ``max_position_embeddings`` may have been multiplied already: then
        ``original_max_position_embeddings`` says so, and the larger of both is meant. llama3 always declares the multiplied
        one, with a factor that reaches further.
        """
        reached = 0.0
        if self.kind in ("linear", "dynamic", "yarn", "longrope"):
            reached = self.original * float((self.parameters or {}).get("factor", 1.0))
        return max(self.max_position_embeddings, int(min(reached + 1e-6, MAX_CONTEXT_TOKENS)))

    def table_of(self, length: int) -> int:
        """Which table of frequencies a sequence of ``length`` tokens has: 0 the plain one, equal numbers the same one."""
        switch = self.switches_at()
        if switch is None or length <= switch:
            return 0
        return length if self.kind == "dynamic" else 1

    def switches_at(self) -> int | None:
        """Sequence length in tokens past which the frequencies depend on it, None when they never do."""
        if self.kind == "dynamic":
            return self.max_position_embeddings
        return self.original if self.kind == "longrope" else None

    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by; scores therefore scale by its square."""
        p = self.parameters or {}
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if (given := p.get("attention_factor")) is not None:
            return float(given)
        if self.kind == "longrope":
            factor = float(p.get("factor") or self.max_position_embeddings / self.original)
            return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(self.original))
        mscale, mscale_all_dim = p.get("mscale"), p.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            return _mscale(p["factor"], mscale) / _mscale(p["factor"], mscale_all_dim)
        return _mscale(p["factor"], 1.0)

    def inverse_frequencies(self, dims: int, length: int) -> Floats:
        """Angles per position for each pair of dimensions, float32 ``[dims / 2]``.

        Args:
            dims: rotated dimensions of a head.
            length: tokens the sequence has so far; read by ``dynamic`` and ``longrope`` only.
        """
        p = self.parameters or {}
        exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        theta = np.float32(self.theta)
        if self.kind == "dynamic":
            seen, factor = max(length, self.max_position_embeddings), p["factor"]
            stretch = (factor * seen / self.max_position_embeddings) - (factor - 1)
            theta = np.float32(self.theta * stretch ** (dims / (dims - 2)))
        plain: Floats = 1.0 / theta**exponents
        if self.kind == "linear":
            return plain / np.float32(p["factor"])
        if self.kind == "yarn":
            keep = 1 - self._yarn_ramp(dims)
            return (plain / np.float32(p["factor"])) * (1 - keep) + plain * keep
        if self.kind == "longrope":
            factors = np.asarray(p["long_factor" if length > self.original else "short_factor"], np.float32)
            if factors.shape != plain.shape:
                raise ConfigError(
                    f"config.json: longrope needs {plain.size} factors for heads of {dims}, not {factors.size}"
                )
            return plain / factors
        return self._llama3(plain) if self.kind == "llama3" else plain

    def _yarn_ramp(self, dims: int) -> Floats:
        """Share of interpolation for each pair: 0 where it turns often within the original context, 1 where seldom."""
        p = self.parameters or {}

        def pair_turning(rotations: float) -> float:
            return dims * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_turning(p.get("beta_fast") or 32), pair_turning(p.get("beta_slow") or 1)
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        return np.clip(ramp, 0, 1).astype(np.float32)

    def _llama3(self, plain: Floats) -> Floats:
        p = self.parameters or {}
        factor, low, high = (float(p[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        wavelength = 2 * math.pi / plain
        smooth = (self.original / wavelength - low) / (high - low)
        blended = (1 - smooth) * plain / factor + smooth * plain
        scaled = np.where(wavelength > self.original / low, plain / factor, plain)
        between = (wavelength >= self.original / high) & (wavelength <= self.original / low)
        return np.where(between, blended, scaled).astype(np.float32)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(key: str, value: Any, low: float, high: float) -> float:
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {key} is {repr(value)[:100]}, not a positive number")
    if not low <= value <= high:
        raise ConfigError(f"config.json: {key} is {value!r}; it must be from {low:g} to {high:g}")
    return float(value)
