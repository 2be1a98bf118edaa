"""Matrices whose values on disk stand in another order than the model's, put right block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.weights.checkpoint import CheckpointReader
from mlx_mixtral.weights.dtypes import as_numpy
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo
from mlx_mixtral_convert.packing.values import Values

__all__ = ["join_halves", "part_halves", "read_transposed", "rotary_heads"]

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


def rotary_heads(matrix: Matrix, config: MixtralConfig) -> int | None:
    """How many heads the rows of a query or key matrix belong to, None for any other matrix.

    The model here rotates rows i and i + head_dim/2 of a head together, Mistral's own files and llama.cpp (``permute`` in its
    convert_hf_to_gguf.py) rows 2i and 2i + 1.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(matrix.path.rpartition(".")[2])


def part_halves(rows: npt.NDArray[Any], heads: int) -> None:
    """Reorder ``rows [heads * head_dim, ...]`` in place, from neighbours that rotate together to halves."""
    rows[:] = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def join_halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The reverse of ``part_halves``, in new memory."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
