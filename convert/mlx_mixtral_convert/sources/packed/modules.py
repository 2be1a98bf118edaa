"""What AWQ, GPTQ and FP8 folders have in common: the hub's names, some modules packed and others plain."""

from __future__ import annotations

from collections.abc import Mapping
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
from mlx_mixtral_convert.sources.hf import HuggingFaceSource, check_float
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["PackedModules", "packing_entry"]

Floats = npt.NDArray[np.float32]


def packing_entry(storage: Storage) -> Mapping[str, Any]:
    """``quantization_config`` of config.json (or its older spelling), empty where there is none."""
    config = storage.folder / "config.json"
    if not is_there(config):
        return {}
    entries = read_json(config)
    entry = entries.get("quantization_config") or entries.get("compression_config")
    return entry if isinstance(entry, Mapping) else {}


class PackedModules(HuggingFaceSource):
    """A folder whose modules are ``NAME.weight``, or several tensors ``NAME.*`` that decode to float32.

    A subclass says which tensors a packed module has, checks them, and decodes one module at a time.
    """

    packed: str
    """The tensor that only a packed module has, as in ``NAME.qweight``."""
    fields: tuple[str, ...]
    """All tensors a packed module may have."""

    def __init__(self, storage: Storage) -> None:
        entries = read_json(storage.folder / "config.json")
        plain = {k: v for k, v in entries.items() if k not in ("quantization_config", "compression_config")}
        self._modules: dict[str, None] = {}
        super().__init__(storage, entries=plain)

    def dtype(self, matrix: Matrix) -> str:
        return "F32" if any(self._is_packed(rows) for rows in self._matrices[matrix.path]) else super().dtype(matrix)

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        module = self._packed_module(item, expert)
        return super().name(item, expert) if module is None else f"{module}.weight"

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        module = self._packed_module(item, expert)
        return super().file(item, expert) if module is None else self.checkpoint[f"{module}.{self.packed}"].file

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        rows = self._matrices[matrix.path][expert]
        if not self._is_packed(rows):
            return super().read(matrix, expert, scratch)
        out = scratch[: 4 * matrix.out_features * matrix.in_features].view(np.float32)
        out = out.reshape(matrix.out_features, matrix.in_features)
        self._decode(_module(rows), out)
        return Values(out, "F32")

    def native(self, matrix: Matrix) -> NativePacking | None:
        """How a matrix can be packed without decoding it; None for a plain one, or one packed only in part."""
        found = self._matrices[matrix.path]
        if not all(self._is_packed(rows) for rows in found):
            return None
        kinds = {self._packing(_module(rows), matrix) for rows in found}
        return kinds.pop() if len(kinds) == 1 else next(kind for kind in kinds if not kind.exact)

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        """One expert's integers in MLX's order."""
        raise NotImplementedError

    def _check(self, module: str, matrix: Matrix) -> None:
        """Raise CheckpointError or ConversionError unless the module's tensors have the shapes ``matrix`` calls for."""
        raise NotImplementedError

    def _decode(self, module: str, out: Floats) -> None:
        """Fill ``out`` ``[out_features, in_features]``."""
        raise NotImplementedError

    def _packing(self, module: str, matrix: Matrix) -> NativePacking:
        raise NotImplementedError

    def _packed_module(self, item: Matrix | Norm, expert: int) -> str | None:
        """The module one expert of a matrix lies in, None for a plain tensor."""
        if isinstance(item, Norm) or not self._is_packed(rows := self._matrices[item.path][expert]):
            return None
        return _module(rows)

    def _is_packed(self, rows: Rows) -> bool:
        return _module(rows) in self._modules

    def _find(self, matrix: Matrix) -> list[Rows]:
        packed = {name.removesuffix(self.packed) for name in self.checkpoint if name.endswith(f".{self.packed}")}
        names = set(self.checkpoint) | {f"{module}weight" for module in packed}
        found = locate(matrix, "weight", names)
        if found is None or not any(f"{_module(rows)}." in packed for rows in found):
            return super()._find(matrix)
        for rows in found:
            module = _module(rows)
            if f"{module}." in packed:
                if rows.of != matrix.out_features:
                    raise CheckpointError(
                        f"{self.path}: module {module!r} has all experts in one, which is not supported"
                    )
                self._modules[module] = None
                self._check(module, matrix)
            else:
                info = self.checkpoint.rows_of(rows)
                if info.shape[-1] != matrix.in_features:
                    raise CheckpointError(f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}")
                check_float(info)
        return found

    def _used(self) -> set[str]:
        virtual = {f"{module}.weight" for module in self._modules}
        return super()._used() - virtual | {f"{module}.{field}" for module in self._modules for field in self.fields}

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


def _module(rows: Rows) -> str:
    return rows.name.removesuffix(".weight")
