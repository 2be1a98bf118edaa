"""Matrices whose values on disk stand in another order than the model's, put right block by block."""

from __future__ import annotations

import numpy as np

from mlx_mixtral.weights.checkpoint import CheckpointReader
from mlx_mixtral.weights.dtypes import as_numpy
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo
from mlx_mixtral_convert.packing.values import Values

__all__ = ["part_halves", "read_transposed"]

BLOCK_BYTES = 4 * 2**20


def read_transposed(reader: CheckpointReader, info: TensorInfo, skip_bytes: int, into: Values) -> None:
    """Fill ``into`` ``[rows, columns]`` from a matrix that lies column by column, ``skip_bytes`` into the tensor."""
    rows, columns = into.array.shape
    row_bytes = rows * ITEM_BYTES[into.dtype]
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, columns, step):
        raw = np.empty((min(step, columns - start), row_bytes), np.uint8)
        reader.read(info, raw.reshape(-1).data, skip_bytes + start * row_bytes)
        into.array[:, start : start + len(raw)] = as_numpy(raw, into.dtype).T


def part_halves(values: Values, head_dim: int) -> None:
    """Reorder the rows of a query or key matrix, in place, from rotating neighbours to rotating halves.

    Mistral's own files rotate rows 2i and 2i+1 of a head together, the model here rows i and i + head_dim/2: in every head
    the even rows come first, then the odd ones.
    """
    rows, columns = values.array.shape
    for head in values.array.reshape(rows // head_dim, head_dim, columns):
        head[:] = head.reshape(head_dim // 2, 2, columns).swapaxes(0, 1).reshape(head_dim, columns)
