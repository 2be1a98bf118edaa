"""PackedFields fields of one expert's matrix: what values they stand for, and blocks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_mixtral.config.quantization import QuantizationSpec

__all__ = ["PackedFields", "columns_of", "dequantized", "joined", "rows_of"]

# ``weight``, and ``scales`` and ``biases`` where there are any.
PackedFields = Mapping[str, mx.array]


def dequantized(packed: PackedFields, spec: QuantizationSpec | None) -> mx.array:
    """The values, float32 ``[rows, columns]``."""
    if spec is None:
        return packed["weight"].astype(mx.float32)
    scales, biases = packed["scales"], packed.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed["weight"], scales, biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)


def rows_of(packed: PackedFields, rows: slice) -> PackedFields:
    return {field: array[rows] for field, array in packed.items()}


def columns_of(packed: PackedFields, columns: slice, of: int) -> PackedFields:
    """Columns, of a matrix of ``of``: both ends are multiples of 128 or its last, and so of whole words and whole groups."""
    return {
        field: array[:, columns.start * array.shape[1] // of : columns.stop * array.shape[1] // of]
        for field, array in packed.items()
    }


def joined(parts: Sequence[PackedFields], axis: int) -> PackedFields:
    return {field: mx.concatenate([part[field] for part in parts], axis=axis) for field in parts[0]}
