"""What folders of packed modules have in common: the hub's names, some modules packed and others plain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Norm, Rows, locate
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.weights.dtypes import as_numpy
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.packing.values import NativePacking, Values
from mlx_mixtral_convert.sources.hf import SETTINGS, HuggingFaceSource, check_float
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["MODELOPT", "THREADS", "Floats", "PackedModules", "packing_entry"]

Floats = npt.NDArray[np.float32]
MODELOPT = "hf_quant_config.json"
# Small tensors that opening reads of every module: one at a time from a hub would take minutes.
THREADS = 8


# What AutoAWQ and GPTQModel call settings that others call by the second name.
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "method": "quant_method"}


def packing_entry(storage: Storage) -> Mapping[str, Any]:
    """How a folder's weights are packed: ``quantization_config`` of config.json (or its older spelling), and what the tool's
    own file beside it adds. Empty where there is neither.
    """
    config, found = storage.folder / "config.json", dict[str, Any]()
    for name, method in SETTINGS.items():
        if is_there(storage.folder / name):
            settings = _spelled(read_json(storage.folder / name))
            found |= {"quant_method": "awq" if "zero_point" in settings else method} | settings
    if is_there(config):
        entries = read_json(config)
        entry = entries.get("quantization_config") or entries.get("compression_config")
        found |= _spelled(entry) if isinstance(entry, Mapping) else {}
    apart = storage.folder / MODELOPT
    if not found and is_there(apart):
        return {"quant_method": "modelopt", **read_json(apart)}
    return found


def _spelled(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {_SPELLINGS.get(key, key): value for key, value in entry.items() if value is not None}


class PackedModules(HuggingFaceSource, ABC):
    """A folder whose modules are ``NAME.weight``, or several tensors ``NAME.*`` that decode to float32.

    A subclass says which tensors a packed module has, checks them, and decodes one module at a time.
    """

    packed: tuple[str, ...]
    """Fields that only packed modules have, as in ``NAME.qweight``; one of them is enough."""

    def __init__(self, storage: Storage) -> None:
        entries = read_json(storage.folder / "config.json")
        plain = {k: v for k, v in entries.items() if k not in ("quantization_config", "compression_config")}
        self._modules: dict[str, None] = {}
        super().__init__(storage, entries=plain)

    def dtype(self, matrix: Matrix) -> str:
        return "F32" if any(self._is_packed(rows) for rows in self._matrices[matrix.path]) else super().dtype(matrix)

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        rows = self._packed_rows(item, expert)
        if rows is None or rows.experts is not None:
            return super().name(item, expert)
        return f"{self._module(rows)}.weight"

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        rows = self._packed_rows(item, expert)
        return super().file(item, expert) if rows is None else self.checkpoint[self._main(rows)].file

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        rows = self._matrices[matrix.path][expert]
        if not self._is_packed(rows):
            return super().read(matrix, expert, scratch)
        out = scratch[: 4 * matrix.out_features * matrix.in_features].view(np.float32)
        out = out.reshape(matrix.out_features, matrix.in_features)
        self._decode(rows, out)
        return Values(out, "F32")

    def native(self, matrix: Matrix) -> NativePacking | None:
        """How a matrix can be packed without decoding it; None for a plain one, or one packed only in part."""
        found = self._matrices[matrix.path]
        if not all(self._is_packed(rows) for rows in found):
            return None
        kinds = {self._packing(rows, matrix) for rows in found}
        return kinds.pop() if len(kinds) == 1 else next(kind for kind in kinds if not kind.exact)

    @abstractmethod
    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        """One expert's integers in MLX's order."""

    @abstractmethod
    def _check(self, rows: Rows, matrix: Matrix) -> None:
        """Raise CheckpointError or ConversionError unless the module's tensors have the shapes ``matrix`` calls for."""

    @abstractmethod
    def _decode(self, rows: Rows, out: Floats) -> None:
        """Fill ``out`` ``[out_features, in_features]``."""

    @abstractmethod
    def _packing(self, rows: Rows, matrix: Matrix) -> NativePacking:
        """How MLX could hold a module."""

    @abstractmethod
    def _main(self, rows: Rows) -> str:
        """The tensor that holds a module's codes."""

    def _packed_rows(self, item: Matrix | Norm, expert: int) -> Rows | None:
        """Where one expert of a matrix lies in a packed module, None for a plain tensor."""
        if isinstance(item, Norm) or not self._is_packed(rows := self._matrices[item.path][expert]):
            return None
        return rows

    def _is_packed(self, rows: Rows) -> bool:
        return self._module(rows) in self._modules

    def _module(self, rows: Rows) -> str:
        return rows.name.removesuffix(".weight")

    @cached_property
    def _packed_names(self) -> set[str]:
        """Every module with a field that only packed ones have, stacked ones under the name of their codes."""
        endings = [f".{field}" for field in self.packed]
        stacked = [f"_{field.removeprefix('weight_')}" for field in self.packed]
        apart = {name.removesuffix(end) for end in endings for name in self.checkpoint if name.endswith(end)}
        together = {name.removesuffix(end) for end in stacked for name in self.checkpoint if name.endswith(end)}
        return apart | {name for name in together if name in self.checkpoint and not name.endswith(".weight")}

    @cached_property
    def _weights(self) -> set[str]:
        """All tensors, and ``NAME.weight`` of packed modules."""
        return {*self.checkpoint, *(f"{module}.weight" for module in self._packed_names)}

    def _find(self, matrix: Matrix) -> list[Rows]:
        found = locate(matrix, "weight", self._weights)
        if found is None or not any(self._module(rows) in self._packed_names for rows in found):
            return super()._find(matrix)
        for rows in found:
            if self._module(rows) in self._packed_names:
                self._modules[self._module(rows)] = None
                self._check(rows, matrix)
            else:
                info = self.checkpoint.rows_of(rows)
                if info.shape[-1] != matrix.in_features:
                    raise CheckpointError(f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}")
                check_float(info)
        return found

    def _used(self) -> set[str]:
        """The tensors of plain matrices and norms; a subclass adds those of packed modules."""
        return super()._used() - {f"{module}.weight" for module in self._modules}

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> TensorInfo:
        info = self.checkpoint[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}; the configuration calls for {list(shape)}"
            )
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has dtype {info.dtype}; {', '.join(dtypes)} was expected"
            )
        return info

    def _array(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows of a tensor as they lie in the file; integers unsigned."""
        info = self.checkpoint[name]
        raw = self._reader.rows(info, start, info.rows if stop is None else stop)
        return as_numpy(raw, {"I32": "U32", "F8_E4M3": "U8"}.get(info.dtype, info.dtype))
