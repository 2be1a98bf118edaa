"""What adapters change of the layers: low-rank products beside the base's, and weights that stand in place of its own.

A base's product is computed for all rows of a forward at once, and what an adapter adds for the rows that asked for it. Rows of
one adapter lie side by side (``AdapterChoice``), so each adapter of a batch costs two products a matrix, whatever the number of
its rows. A forward without adapters computes just what it did before there were any.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_mixtral.layers.linear import Linear, Products

__all__ = ["LowRankChange", "Replaced", "ReplacedRows"]


class LowRankChange:
    """``f * (y + (x A^T) B^T) + bias`` (arXiv 2106.09685; with a factor DoRA, arXiv 2402.09353).

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``, times the adapter's scale.
        factor: ``[out]``, of rows of the changed matrix; None for 1.
        bias: ``[out]``, None for none.
    """

    def __init__(self, a: Linear, b: Linear, factor: mx.array | None = None, bias: mx.array | None = None) -> None:
        self._a, self._b, self._factor, self._bias = a, b, factor, bias

    @property
    def arrays(self) -> Iterator[mx.array]:
        """All arrays held."""
        held = (self._a.weight, self._b.weight, self._factor, self._bias)
        return (array for array in held if array is not None)

    def product(self, x: mx.array, y: mx.array, products: Products) -> mx.array:
        return self._finished(products.low_rank(x, y, self._a, self._b))

    def rows(self, indices: mx.array, y: mx.array) -> mx.array:
        y = y + (self._b.weight[indices] @ self._a.weight).astype(y.dtype)
        return y if self._factor is None else y * self._factor[indices][..., None]

    def part(self, start: int, stop: int) -> LowRankChange:
        factor, bias = (None if array is None else array[start:stop] for array in (self._factor, self._bias))
        return LowRankChange(self._a, self._b.part(start, stop), factor, bias)

    def _finished(self, y: mx.array) -> mx.array:
        if self._factor is not None:
            y = y * self._factor
        return y if self._bias is None else y + self._bias


class Replaced:
    """``x W'^T`` with another matrix ``[out, in]`` in place of the base's."""

    def __init__(self, weight: Linear) -> None:
        self._weight = weight

    @property
    def arrays(self) -> Iterator[mx.array]:
        yield self._weight.weight

    def product(self, x: mx.array, y: mx.array, products: Products) -> mx.array:
        return self._weight(x)

    def rows(self, indices: mx.array, y: mx.array) -> mx.array:
        return self._weight.rows(indices, y.dtype)

    def part(self, start: int, stop: int) -> Replaced:
        return Replaced(self._weight.part(start, stop))


class ReplacedRows:
    """Other rows of a matrix for a few tokens, of an embedding or of an output head.

    Args:
        places: ``[V]`` int32, which of ``weight`` stands in place of a row; -1 for none.
        weight: ``[n, D]``.
    """

    def __init__(self, places: mx.array, weight: Linear) -> None:
        self._places, self._weight = places, weight

    @property
    def arrays(self) -> Iterator[mx.array]:
        yield from (self._places, self._weight.weight)

    def product(self, x: mx.array, y: mx.array, products: Products) -> mx.array:
        own = self._weight(x)[..., mx.maximum(self._places, 0)]
        return mx.where(self._places >= 0, own, y)

    def rows(self, indices: mx.array, y: mx.array) -> mx.array:
        places = self._places[indices]
        own = self._weight.rows(mx.maximum(places, 0), y.dtype)
        return mx.where(places[..., None] >= 0, own, y)

    def part(self, start: int, stop: int) -> ReplacedRows:
        return ReplacedRows(self._places[start:stop], self._weight)
