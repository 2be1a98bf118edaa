"""How far a calibration is, in work that takes about as long everywhere, and how long the rest should take.

A unit is one weight times one token. Packing a weight by search takes as long as ``PACKING`` of them, on the CPU measured here
and on a GPU by its bandwidth and its rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral_convert.calibration.layer import read_matrix, times
from mlx_mixtral_convert.calibration.sensitivity import CANDIDATES, packed, reference
from mlx_mixtral_convert.calibration.uniform import ANCHOR_BITS, ANCHOR_ROUNDINGS
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["CalibrationProgress", "WorkCounter", "trial_seconds"]

PACKING = 4000
GROUPS_A_LAYER = 4
TRIAL_ROWS = 4096


@dataclass(frozen=True)
class CalibrationProgress:
    """One step: decoder layers done of ``layers``, the share of all work (0 to 1), and what is left in seconds, about."""

    layer: int
    layers: int
    share: float
    seconds_left: float


class WorkCounter:
    """Counts work and tells ``progress`` of it.

    Args:
        tokens: that the text has, and those that sensitivities are measured on (0 without).
        seconds: of a unit of work, from a trial; what was done tells better as soon as there is something.
    """

    def __init__(
        self,
        config: MixtralConfig,
        tokens: tuple[int, int],
        seconds: float,
        progress: Callable[[CalibrationProgress], None] | None,
    ) -> None:
        self._config, self._tokens, self._seconds, self._progress = config, tokens, seconds, progress
        self._layers = [self._layer_work(layer) for layer in range(config.num_hidden_layers)]
        self._total = sum(self._layers) + self._head_work()
        self._layer, self._done = 0, 0.0
        self._resumed, self._started = 0.0, time.perf_counter()

    def begin(self, layer: int) -> None:
        """Nothing was done in this run, and the layers before ``layer`` in earlier ones."""
        self._layer, self._done = layer, sum(self._layers[:layer])
        self._resumed, self._started = self._done, time.perf_counter()
        self._tell()

    def tick(self) -> None:
        """One of the equal steps of a layer, or of what follows the last, is done."""
        last = self._layer == len(self._layers)
        work = self._head_work() if last else self._layers[self._layer]
        limit = self._total if last else sum(self._layers[: self._layer + 1])
        steps = self._head_steps() if last else 2 + max(1, self._config.num_local_experts)
        self._done = min(self._done + work / steps, limit)
        self._tell()

    def finish_layer(self) -> None:
        self._layer += 1
        self._done = sum(self._layers[: self._layer])
        self._tell()

    def finish(self) -> None:
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        if self._progress is None:
            return
        here, elapsed = self._done - self._resumed, time.perf_counter() - self._started
        # The trial counts as a twentieth of the work: it steadies the first figures.
        trial = self._total / 20
        unit = (elapsed + self._seconds * trial) / (here + trial)
        left = max(self._total - self._done, 0.0) * unit
        self._progress(CalibrationProgress(self._layer, len(self._layers), self._done / self._total, left))

    def _layer_work(self, layer: int) -> float:
        own = [matrix for matrix in matrices(self._config) if matrix.layer == layer and matrix.part != "router"]
        routed = self._config.num_experts_per_tok / max(1, self._config.num_local_experts)
        active = sum(m.parameters * (routed if m.num_experts else 1) for m in own)
        every = sum(matrix.parameters for matrix in own)
        text, few = self._tokens
        if not few:
            return text * active
        streams = 2 + GROUPS_A_LAYER * layer + len(CANDIDATES) + len(ANCHOR_BITS) * len(ANCHOR_ROUNDINGS)
        return (text + few * streams) * active + PACKING * len(CANDIDATES) * every

    def _head_work(self) -> float:
        few = self._tokens[1]
        if not few:
            return 0.0
        head = self._config.vocab_size * self._config.hidden_size
        return head * (few * self._head_steps() + PACKING * (len(CANDIDATES) + len(ANCHOR_BITS)))

    def _head_steps(self) -> int:
        return 1 + GROUPS_A_LAYER * len(self._layers) + len(ANCHOR_BITS) * len(ANCHOR_ROUNDINGS)


def trial_seconds(source: TensorSource, *, sensitivities: bool) -> float:
    """Seconds of a unit of work: rows of one matrix packed, or multiplied where nothing will be packed."""
    listed = list(matrices(source.config))
    weight = read_matrix(source, next((m for m in listed if m.part == "expert"), listed[1]))[:TRIAL_ROWS]
    rows, columns = weight.shape
    if (spec := reference(columns)) is not None and sensitivities:
        packed(weight[:8], spec)  # kernels are warm
        started = time.perf_counter()
        packed(weight, spec)
        return (time.perf_counter() - started) / (PACKING * weight.size)
    x = mx.ones((256, columns))
    mx.eval(times(x, weight))
    started = time.perf_counter()
    mx.eval(times(x, weight))
    return (time.perf_counter() - started) / (256 * rows * columns)
