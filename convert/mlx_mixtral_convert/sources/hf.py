"""Hugging Face folders of safetensors: experts one by one, fused or stacked, and dense Mistral and Llama models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, Norm, Rows, hf_name, locate, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import mlx_entry
from mlx_mixtral.config.supported import CONVERTIBLE_METHODS
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy, convert
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral.weights.unused import refuse_unused, unused_tensors
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.base import SourceFiles
from mlx_mixtral_convert.sources.storage.file import StoredCheckpoint, StoredReader
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.unsupported import unsupported_method

__all__ = ["SETTINGS", "HuggingFaceSource", "check_float", "detect", "missing_settings"]

SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""The file a packing tool writes its settings to, by itself, and the method it means where it names none."""


def detect(storage: Storage) -> bool:
    """Whether there is a Hugging Face configuration."""
    return is_there(storage.folder / "config.json")


class HuggingFaceSource:
    """``config.json`` and safetensors weights.

    Every tensor the configuration calls for is found and checked here, and tensors it does not call for are refused: a model
    that leaves weights out would run and answer wrongly.

    Args:
        checkpoint: tensors of other files, under Hugging Face's or MLX's names; the storage's safetensors when None.
        entries: the configuration, where it does not come from ``config.json``.

    Raises:
        CheckpointError: a tensor is missing, left over, a bias that is not zero, of another shape or not of a float type;
            damaged headers or index.
        ConfigError: config.json describes another architecture.
        ConversionError: the weights are quantised already.
    """

    def __init__(
        self, storage: Storage, checkpoint: Checkpoint | None = None, entries: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.folder = storage.path, storage.folder
        self.entries = read_json(self.folder / "config.json") if entries is None else entries
        _refuse_quantized(self.entries, self.path)
        self.config = MixtralConfig.from_hf(self.entries)
        self.checkpoint = StoredCheckpoint(storage) if checkpoint is None else checkpoint
        self._reader = StoredReader(storage)
        self._matrices = {matrix.path: self._find(matrix) for matrix in matrices(self.config)}
        self._norms = {norm.path: self._find_norm(norm) for norm in norms(self.config)}
        unused = unused_tensors(self.checkpoint, self._used(), self.config)
        self.notes = refuse_unused(unused, self._reader)
        self.files = SourceFiles(storage, self.checkpoint.files)

    def dtype(self, matrix: Matrix) -> str:
        found = {self.checkpoint[rows.name].dtype for rows in self._matrices[matrix.path]}
        # float32 holds what either of the types of 16 bits does.
        return found.pop() if len(found) == 1 else "F32"

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        if isinstance(item, Norm):
            return self._norms[item.path].name
        rows = self._matrices[item.path][expert]
        own = self.checkpoint[rows.name].name
        return own if rows.experts is None else f"{own}[{expert}]"

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        if isinstance(item, Norm):
            return self._norms[item.path].file
        return self.checkpoint[self._matrices[item.path][expert].name].file

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        rows = self._matrices[matrix.path][expert]
        info = self.checkpoint[rows.name]
        own = self.dtype(matrix)
        memory = scratch if own == info.dtype else np.empty(matrix.out_features * info.row_bytes, np.uint8)
        raw = memory[: matrix.out_features * info.row_bytes].reshape(matrix.out_features, info.row_bytes)
        values = Values(as_numpy(raw, info.dtype), info.dtype)
        self._fill(matrix, info, rows.start * info.row_bytes, values)
        if own == info.dtype:
            return values
        wide = scratch[: 4 * matrix.out_features * matrix.in_features].view(np.float32).reshape(values.array.shape)
        wide[:] = convert(values.array, info.dtype, own)
        return Values(wide, own)

    def read_norm(self, norm: Norm) -> Values:
        info = self._norms[norm.path]
        return Values(as_numpy(self._reader.rows(info, 0, 1), info.dtype), info.dtype)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> HuggingFaceSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        """Read one expert of a matrix, which starts ``skip_bytes`` into its tensor."""
        raw = into.array.view(np.uint8).reshape(-1)
        self._reader.read(info, memoryview(raw), skip_bytes)  # type: ignore[arg-type]

    def _find(self, matrix: Matrix) -> list[Rows]:
        found = locate(matrix, "weight", self.checkpoint)
        if found is None and any(name.endswith(".qweight") for name in self.checkpoint):
            raise missing_settings(self.path)
        if locate(matrix, "scales", self.checkpoint) is not None:
            raise ConversionError(
                f"{self.path}: {matrix.path} is quantised already (it has scales); convert from the unquantised original"
            )
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {self._missing(matrix)!r} is missing")
        for rows in found:
            info = self.checkpoint.rows_of(rows)
            if info.shape[-1] != matrix.in_features:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; "
                    f"the configuration calls for {matrix.in_features} columns"
                )
            check_float(info)
        return found

    def _missing(self, matrix: Matrix) -> str:
        """What this layout would call a matrix that is not there."""
        return hf_name(matrix)

    def _find_norm(self, norm: Norm) -> TensorInfo:
        info = self.checkpoint[f"{norm.path}.weight"]
        if info.shape != (norm.size,):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; the configuration calls for [{norm.size}]"
            )
        check_float(info)
        return info

    def _used(self) -> set[str]:
        """The names of all tensors that matrices and norms are read from."""
        used = {rows.name for found in self._matrices.values() for rows in found}
        return used | {f"{path}.weight" for path in self._norms}


def _refuse_quantized(entries: Mapping[str, Any], path: Path) -> None:
    if mlx_entry(entries) is not None:
        raise ConversionError(
            f"{path} is an MLX checkpoint that is quantised already, which this kind does not read; leave out --kind"
        )
    foreign = entries.get("quantization_config") or entries.get("compression_config")
    if isinstance(foreign, Mapping):
        # As text a terminal can be given: control characters escaped.
        method = repr(str(foreign.get("quant_method", "an unnamed method"))[:40])[1:-1]
        if method in CONVERTIBLE_METHODS:
            raise ConversionError(
                f"{path}: the weights are quantised with {method}, which this kind does not read; leave out --kind"
            )
        raise ConversionError(f"{path}: {unsupported_method(foreign)}")


def missing_settings(path: Path) -> ConversionError:
    """The error for packed weights of which nothing says how."""
    return ConversionError(
        f"{path}: the weights are packed by GPTQ or AWQ, and nothing says how: neither quantization_config in config.json, nor "
        f"{' or '.join(SETTINGS)}; put that file next to them"
    )


def check_float(info: TensorInfo) -> None:
    """Raise CheckpointError unless a tensor is of a float type that can be converted."""
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; {', '.join(FLOATS)} can be converted"
        )
