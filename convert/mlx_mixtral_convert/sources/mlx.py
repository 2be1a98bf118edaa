"""MLX checkpoints that are quantised already, ours and mlx-lm's: to pack again with other bits, or to pass on as they are.

Experts may be stacked, or apart as in the oldest repositories; any module may have bits of its own or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Rows, fields_of, locate, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec, mlx_entry
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy, convert, is_finite
from mlx_mixtral.weights.packing import packing_of
from mlx_mixtral_convert.packing.measure import decode, row_blocks
from mlx_mixtral_convert.packing.values import NativePacking, Values
from mlx_mixtral_convert.sources.base import tensor_place
from mlx_mixtral_convert.sources.hf import HuggingFaceSource
from mlx_mixtral_convert.sources.storage.file import StoredCheckpoint
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["MlxSource", "detect"]


def detect(storage: Storage) -> bool:
    """Whether the configuration says that MLX packed the weights."""
    config = storage.folder / "config.json"
    return is_there(config) and mlx_entry(read_json(config)) is not None


class MlxSource(HuggingFaceSource):
    """A folder of packed matrices; they are read as float32, one expert at a time.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
        ConfigError: config.json describes another architecture, or a packing the tensors do not have.
    """

    def __init__(
        self, storage: Storage, checkpoint: Checkpoint | None = None, entries: Mapping[str, Any] | None = None
    ) -> None:
        entries = read_json(storage.folder / "config.json") if entries is None else entries
        checkpoint = StoredCheckpoint(storage) if checkpoint is None else checkpoint
        config = MixtralConfig.from_hf(entries)
        # What the runtime takes the tensors for.
        self._specs = {matrix.path: packing_of(matrix, config.quantization, checkpoint) for matrix in matrices(config)}
        self._parts: dict[str, dict[Field, list[Rows]]] = {}
        for matrix in matrices(config):
            if (spec := self._specs[matrix.path]) is not None:
                self._parts[matrix.path] = {field: _part(matrix, field, spec, checkpoint) for field in fields_of(spec)}
        packing = ("quantization", "quantization_config")
        super().__init__(storage, checkpoint, {key: value for key, value in entries.items() if key not in packing})

    def dtype(self, matrix: Matrix) -> str:
        return super().dtype(matrix) if self._specs[matrix.path] is None else "F32"

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        if (spec := self._specs[matrix.path]) is None:
            return super().read(matrix, expert, scratch)
        out = scratch[: 4 * matrix.out_features * matrix.in_features].view(np.float32)
        out = out.reshape(matrix.out_features, matrix.in_features)
        for block in row_blocks(*out.shape):
            parts: dict[str, npt.NDArray[Any]] = {}
            for field in fields_of(spec):
                array, dtype = self._rows(matrix, field, expert, block)
                parts[field] = array if field == "weight" or not spec.has_biases else convert(array, dtype, "F32")
            out[block] = decode(parts, spec)
        return Values(out, "F32")

    def native(self, matrix: Matrix) -> NativePacking | None:
        """The packing the matrix has; scales and biases of float16 stay what they are."""
        if (spec := self._specs[matrix.path]) is None:
            return None
        floats = [rows for field, found in self._parts[matrix.path].items() if field != "weight" for rows in found]
        lossless = all(self.checkpoint[rows.name].dtype in ("F16", "U8") for rows in floats)
        return NativePacking(spec, True, f"MLX {spec}", lossless=lossless)

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        """One expert's words, and scales and biases in float16 (scales of one byte for modes other than affine)."""
        spec = self._specs[matrix.path]
        assert spec is not None
        packed: dict[Field, npt.NDArray[Any]] = {}
        for field in fields_of(spec):
            array, dtype = self._rows(matrix, field, expert, slice(0, matrix.out_features))
            if field != "weight" and spec.has_biases:
                array = convert(array, dtype, "F16")
                if not is_finite(array, "F16"):
                    raise ConversionError(f"{tensor_place(self, matrix, expert)} has {field} beyond float16's range")
            packed[field] = array
        return packed

    def _rows(self, matrix: Matrix, field: Field, expert: int, block: slice) -> tuple[npt.NDArray[Any], str]:
        rows = self._parts[matrix.path][field][expert]
        info = self.checkpoint[rows.name]
        return as_numpy(
            self._reader.rows(info, rows.start + block.start, rows.start + block.stop), info.dtype
        ), info.dtype

    def _find(self, matrix: Matrix) -> list[Rows]:
        if matrix.path not in self._parts:
            return super()._find(matrix)
        return self._parts[matrix.path]["weight"]

    def _used(self) -> set[str]:
        packed = {rows.name for parts in self._parts.values() for found in parts.values() for rows in found}
        return super()._used() | packed


def _part(matrix: Matrix, field: Field, spec: QuantizationSpec, checkpoint: Checkpoint) -> list[Rows]:
    """Where one field of a packed matrix lies, after checking its shape and type."""
    found = locate(matrix, field, checkpoint)
    if found is None:
        raise CheckpointError(f"{checkpoint.folder}: tensor {matrix.path}.{field} is missing in every layout")
    columns = spec.packed_columns(matrix.in_features) if field == "weight" else spec.groups(matrix.in_features)
    wanted = ("U32",) if field == "weight" else FLOATS if spec.mode == "affine" else ("U8",)
    for rows in found:
        info = checkpoint.rows_of(rows)
        if info.shape[-1] != columns:
            raise CheckpointError(
                f"{info.file}: tensor {rows.name!r} has shape {list(info.shape)}; its last axis should be {columns}"
            )
        if info.dtype not in wanted:
            raise CheckpointError(
                f"{info.file}: tensor {rows.name!r} has dtype {info.dtype}; {', '.join(wanted)} was expected"
            )
    return found
