"""What the unquantised model says of a text, which others are held to."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral_convert.calibration.layer import times

__all__ = ["Truth"]


class Truth:
    """The true log-probabilities of ``final [B, L, D]`` under the true head, computed once."""

    def __init__(self, final: mx.array, head: mx.array) -> None:
        self.final = final
        self._log_p = [_log_softmax(times(row, head)) for row in final]
        mx.eval(self._log_p)

    def kl(self, final: mx.array, head: mx.array) -> npt.NDArray[np.float64]:
        """``E KL(p ‖ p')`` of each sequence, ``[B]``, with other states or another head; one at a time, for logits are wide."""
        found = []
        for row, log_p in zip(final, self._log_p, strict=True):
            log_q = _log_softmax(times(row, head))
            found.append(float(np.array((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())))
        return np.array(found)

    def mean_kl(self, final: mx.array, head: mx.array) -> float:
        return max(float(self.kl(final, head).sum()) / len(self._log_p), 0.0)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
