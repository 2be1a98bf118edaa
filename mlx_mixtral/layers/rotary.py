"""Rotary position embedding of queries and keys, half-rotation form (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.rope import RopeConfig

__all__ = ["Rotary"]


class Rotary:
    """Rotates ``[B, heads, L, d]`` by position. One object serves all layers.

    ``score_scale`` is what scaling kinds with an attention factor multiply attention scores by: cosines and sines are both
    scaled by the factor, hence scores by its square, and folding it there costs nothing.
    """

    def __init__(self, config: RopeConfig, dims: int) -> None:
        self.config = config
        self.dims = dims
        self.score_scale = config.attention_factor() ** 2
        self._frequencies: dict[int, mx.array] = {}
        self.table(0)  # a wrong number of factors fails at load, not in the first forward

    def __call__(self, x: mx.array, offset: int | mx.array, table: mx.array | None) -> mx.array:
        """Rotate.

        Args:
            offset: position of the first token, or one a row ``[B]``.
            table: what ``table`` gives for the length of the sequence.
        """
        config = self.config
        if table is not None:
            return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=table)
        scale = 1.0 / float((config.parameters or {}).get("factor", 1.0)) if config.kind == "linear" else 1.0
        return mx.fast.rope(x, self.dims, traditional=False, base=config.theta, scale=scale, offset=offset)

    def table(self, length: int) -> mx.array | None:
        """What positions are divided by, ``[d / 2]`` float32; None where the base says it all.

        Args:
            length: tokens in the sequence, which ``dynamic`` and ``longrope`` frequencies depend on.
        """
        if self.config.kind in ("default", "linear"):
            return None
        key = self.config.table_of(length)
        if key not in self._frequencies:
            if len(self._frequencies) > 1:
                self._frequencies.popitem()
            table = mx.array(np.float32(1.0) / self.config.inverse_frequencies(self.dims, length if key else 0))
            mx.eval(table)
            self._frequencies[key] = table
        return self._frequencies[key]
