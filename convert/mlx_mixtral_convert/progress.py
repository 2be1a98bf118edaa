"""What a conversion tells its caller while it runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mlx_mixtral.config.layout import Matrix

__all__ = ["Progress", "ProgressCounter", "downloading"]


@dataclass(frozen=True)
class Progress:
    """One step. ``download`` counts bytes fetched, ``convert`` bytes of source weights converted, ``finish`` is the end.

    ``layer`` is the decoder layer at hand, None outside the layers; ``what`` names the matrix, layer or file. Rounding by gptq
    or tuned works through a layer before its first matrix is written: the layer's bytes count with its experts, and
    ``seconds_left`` says about how long the layers still take, once the attention of the first shows it.
    """

    stage: Literal["download", "convert", "finish"]
    done_bytes: int
    total_bytes: int
    layer: int | None
    layers: int
    what: str
    seconds_left: float | None = None


class ProgressCounter:
    """Counts the source bytes that are done, and tells ``progress`` of each step.

    Args:
        done_bytes: of ``total_bytes``, what an earlier run did.
        layers: how many the model has.
        layer_bytes: of layers that are not done, for ``walk``.
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        total_bytes: int,
        layers: int,
        done_bytes: int = 0,
        *,
        layer_bytes: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.total_bytes, self._kept = total_bytes, done_bytes
        self._progress, self._layers, self._layer_bytes = progress, layers, layer_bytes
        self._stepped: Counter[int | None] = Counter()
        self._shares: dict[int, float] = {}
        self._started: float | None = None

    @property
    def done_bytes(self) -> int:
        found = self._stepped.copy()
        for layer, share in self._shares.items():
            found[layer] = max(found[layer], int(share * self._layer_bytes[layer]))
        return self._kept + found.total()

    def step(self, matrix: Matrix, nbytes: int) -> None:
        """An expert of a matrix is done."""
        self._stepped[matrix.layer] += nbytes
        self._tell(matrix.layer, matrix.path)

    def walk(self, layer: int, share: float) -> None:
        """Of the work on a whole layer, before its matrices are done one by one, this share is done."""
        if layer in self._layer_bytes:
            self._started = time.perf_counter() if self._started is None else self._started
            self._shares[layer] = share
        self._tell(layer, f"model.layers.{layer}")

    def finish(self, what: str) -> None:
        """Everything is."""
        if self._progress is not None:
            self._progress(Progress("finish", self.total_bytes, self.total_bytes, None, self._layers, what))

    def _tell(self, layer: int | None, what: str) -> None:
        if self._progress is not None:
            args = self.done_bytes, self.total_bytes, layer, self._layers, what, self._seconds_left()
            self._progress(Progress("convert", *args))

    def _seconds_left(self) -> float | None:
        done = sum(self._shares.values())
        if self._started is None or not done:
            return None
        return (time.perf_counter() - self._started) * (len(self._layer_bytes) - done) / done


def downloading(progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """Tells of a download in these terms."""
    if progress is None:
        return None
    return lambda done, total: progress(Progress("download", done, total, None, 0, "weights"))
