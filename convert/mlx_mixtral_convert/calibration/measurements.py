"""The measuring itself: all layers, each with what is kept of it, from the first or from where an earlier run ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral_convert.calibration.file import Losses
from mlx_mixtral_convert.calibration.progress import WorkCounter
from mlx_mixtral_convert.calibration.sensitivity import Sensitivity
from mlx_mixtral_convert.calibration.states import States, Stored
from mlx_mixtral_convert.calibration.unfinished import Unfinished
from mlx_mixtral_convert.calibration.uniform import Anchors
from mlx_mixtral_convert.calibration.walk import Sums, Walk
from mlx_mixtral_convert.sources import TensorSource

__all__ = ["Measurements"]


class Measurements:
    """What a calibration keeps of ``tokens [B, L]``.

    Args:
        few: the sequences for sensitivities, None for no sensitivities.
        counts: of a routing trace that weighs them.
        folder: where hidden states are meanwhile, as for ``States``.
    """

    def __init__(
        self,
        source: TensorSource,
        tokens: npt.NDArray[np.int32],
        few: npt.NDArray[np.int32] | None,
        counts: npt.NDArray[np.int64] | None,
        work: WorkCounter,
        folder: Path | None = None,
    ) -> None:
        self._walk, self._work = Walk(source, tokens, folder=folder), work
        self._sensitivity = None if few is None else Sensitivity(source, few, counts, work.tick, folder)
        self.mean_squares: dict[str, npt.NDArray[np.float32]] = {}
        self.routed: dict[str, npt.NDArray[np.int64]] = {}
        self.losses: Losses = {}
        self.anchors: Anchors = {}

    def run(self, unfinished: Unfinished) -> Measurements:
        """Measure what ``unfinished`` does not have yet."""
        if (known := unfinished.read()) is not None:
            self._restore(*known)
        self._work.begin(self._walk.next_layer)
        if self._sensitivity is not None and known is None:
            self._sensitivity.start()
        for layer, sums in self._walk.layers():
            self._keep(sums)
            if self._sensitivity is not None:
                self._sensitivity.step(layer)
            self._work.finish_layer()
            unfinished.offer(lambda: (self._arrays(), self._figures()))
        self._keep(self._walk.head_sum())
        if self._sensitivity is not None:
            self.losses, self.anchors = self._sensitivity.finish(self._walk)
        self._work.finish()
        return self

    def _keep(self, sums: Sums) -> None:
        for name, found in sums.items():
            self.mean_squares[name] = np.stack([one.mean_squares for one in found])
            self.routed[name] = np.array([one.tokens for one in found])

    def _arrays(self) -> dict[str, mx.array | States]:
        found: dict[str, mx.array | States] = {"hidden": self._walk.hidden}
        found |= {f"squares.{name}": mx.array(array) for name, array in self.mean_squares.items()}
        if self._sensitivity is not None:
            found |= self._sensitivity.arrays()
        return found

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "layers": self._walk.next_layer,
            "routed": {name: array.tolist() for name, array in self.routed.items()},
        }
        return figures | (self._sensitivity.figures() if self._sensitivity is not None else {})

    def _restore(
        self, arrays: Mapping[str, mx.array], states: Mapping[str, Stored], figures: Mapping[str, Any]
    ) -> None:
        self._walk.hidden.load(states["hidden"])
        self._walk.next_layer = figures["layers"]
        self.mean_squares = {
            name.removeprefix("squares."): np.array(array)
            for name, array in arrays.items()
            if name.startswith("squares.")
        }
        self.routed = {name: np.array(listed) for name, listed in figures["routed"].items()}
        if self._sensitivity is not None:
            self._sensitivity.restore(arrays, states, figures)
