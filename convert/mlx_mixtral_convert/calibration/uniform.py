"""Models packed alike throughout, measured as a whole: what the sum of single losses is held to.

Losses of single groups do not simply add up. Errors of different layers partly cancel at few bits; at many bits what is left
comes mostly from tokens whose router chooses another expert, which no square of a small error describes; and rounding plainly
loses more than searching. So a model with all its groups at ``ANCHOR_BITS``, once for each rounding, travels through the layers
beside the true one, and its KL is taken at the end. ``correction`` says from that by how much a sum of losses is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.calibration.layer import Expert, Layer, Routing, times
from mlx_mixtral_convert.packing.measure import digits

__all__ = [
    "ANCHOR_BITS",
    "ANCHOR_ROUNDINGS",
    "BESIDE_SEARCH",
    "Anchors",
    "UniformModels",
    "anchor",
    "correction",
    "plainly_packed",
]

ANCHOR_BITS = (2, 3, 4, 6, 8)
ANCHOR_ROUNDINGS = ("plain", "search")
# What GPTQ, and tuning on text that the model wrote, lose of what search does, and how far single conversions are from that:
# of the bundled checkpoint fitted to 2.1 to 4.5 bits, in tests/benchmarks/quality.md. SmolLM2 loses 0.62 and 0.69 with GPTQ.
BESIDE_SEARCH = {"gptq": (0.62, 0.1), "tuned": (0.48, 0.13)}

# rounding -> (sum of losses, KL measured, its standard error) of each uniform model, ascending
Anchors = Mapping[str, Sequence[Sequence[float]]]
Matrices = Mapping[str, mx.array]


def plainly_packed(weight: mx.array, spec: QuantizationSpec) -> mx.array:
    """``weight`` as it comes back from ``mx.quantize``, float32; scales as a bfloat16 conversion has them."""
    codes, scales, biases = mx.quantize(weight.astype(mx.bfloat16), group_size=spec.group_size, bits=spec.bits)
    found = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), spec.group_size, spec.bits)
    mx.eval(found)
    return found


class UniformModels:
    """States ``[B, L, D]`` of the model at each rounding and number of bits, on their way through the layers.

    The caller packs: it has the searched matrices at hand. A layer is ``attend`` for every model, then ``expert`` for each
    expert and model, then ``close``.
    """

    def __init__(self) -> None:
        self.states: dict[tuple[str, int], mx.array] = {}
        self._after: dict[tuple[str, int], mx.array] = {}
        self._routing: dict[tuple[str, int], Routing] = {}

    def models(self, bits: int) -> Iterator[tuple[str, int]]:
        """Those of so many bits."""
        return (key for key in self.states if key[1] == bits)

    def attend(self, layer: Layer, key: tuple[str, int], weights: Matrices) -> None:
        """Up to the experts, with ``weights`` for q, k, v and o where they are packed."""
        self.states[key] = layer.attend(self.states[key], dict(weights))
        self._after[key] = self._flat(key)
        self._routing[key] = layer.route(layer.post_norm(self._flat(key)))

    def expert(
        self, layer: Layer, key: tuple[str, int], expert: Expert, gate: mx.array, up: mx.array, down: mx.array
    ) -> None:
        """Add what one expert gives with these matrices."""
        for tokens, weights in self._routing[key].pieces(expert.index):
            x, places = layer.post_norm(self._flat(key)[mx.array(tokens)]), mx.array(tokens)
            out = weights * times(expert(x, (gate, up)), down)
            self._after[key] = self._after[key].at[places].add(out)
            mx.eval(self._after[key])

    def close(self) -> None:
        """The layer is passed."""
        for key, after in self._after.items():
            self.states[key] = after.reshape(self.states[key].shape)
        self._after, self._routing = {}, {}

    def _flat(self, key: tuple[str, int]) -> mx.array:
        return self.states[key].reshape(-1, self.states[key].shape[-1])


def anchor(predicted: float, kl: npt.NDArray[np.float64]) -> list[float]:
    """One uniform model: the sum of its losses, its KL over sequences ``[B]``, and the standard error of that."""
    mean = max(float(kl.mean()), 0.0)
    error = float(kl.std(ddof=1)) / math.sqrt(len(kl)) if len(kl) > 1 else mean
    return [digits(predicted), digits(mean), digits(error)]


def correction(anchors: Anchors, rounding: str, predicted: float) -> tuple[float, float] | None:
    """``(KL / sum of losses, its relative standard error)`` at a sum of ``predicted``; None where nothing was measured.

    Between two uniform models it is interpolated, in logarithms of both, and beyond the outermost that one's is taken. The
    error is the nearer model's own and, towards the middle between two, half of what they differ by. GPTQ and tuning
    lose ``BESIDE_SEARCH`` of what search does, which adds an error of its own.
    """
    beside, spread = BESIDE_SEARCH.get(rounding, (1.0, 0.0))
    rows = [
        row for row in anchors.get("search" if rounding in BESIDE_SEARCH else rounding, ()) if row[0] > 0 and row[1] > 0
    ]
    if not rows or predicted <= 0:
        return None
    places = np.log([row[0] for row in rows])
    factors = np.log([row[1] / row[0] for row in rows])
    errors = np.array([row[2] / row[1] for row in rows])
    place = math.log(predicted)
    factor = float(np.interp(place, places, factors))
    nearest = int(np.abs(places - place).argmin())
    between = abs(factor - float(factors[nearest]))
    return beside * math.exp(factor), math.hypot(float(errors[nearest]), between, spread)
