"""Integers with a scale and a zero point for each group of inputs: AWQ and GPTQ, whose matrices both lie ``[in, out]``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.config.layout import Field, Matrix, Rows
from mlx_mixtral.config.quantization import AFFINE_GROUP_SIZES, QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.weights.dtypes import convert
from mlx_mixtral_convert.packing.measure import row_blocks, unpack
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.base import tensor_place
from mlx_mixtral_convert.sources.hf import missing_settings
from mlx_mixtral_convert.sources.packed.modules import Floats, PackedModules, packing_entry
from mlx_mixtral_convert.sources.storage.file import StoredCheckpoint
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["GroupedSource", "fields_of_words"]

Codes = npt.NDArray[np.uint8]


def fields_of_words(words: npt.NDArray[Any], bits: int) -> Codes:
    """The ``32 / bits`` numbers of each word along a new last axis, from the lowest bits on."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.uint8)


class GroupedSource(PackedModules):
    """A folder with ``qweight``, ``qzeros`` and ``scales``: ``w = (q - zero) * scale``.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
        ConversionError: a number of bits or a variant that is not read here.
    """

    packed = ("qweight",)
    fields: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    method: str
    allowed_bits: tuple[int, ...]

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        if not entry:
            raise self._unknown(storage)
        self.bits, self.group_size = (self._number(storage, entry, name) for name in ("bits", "group_size"))
        if self.bits not in self.allowed_bits:
            allowed = " or ".join(map(str, self.allowed_bits))
            raise ConversionError(
                f"{storage.path}: {self.method} with {self.bits} bits is not supported; {allowed} can be converted"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise ConversionError(f"{storage.path}: {self.method} with groups of {self.group_size} is not supported")
        super().__init__(storage)

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        """One expert's integers, the scales, and ``-zero * scale`` as biases, groups cut to a size MLX has."""
        rows = self._matrices[matrix.path][expert]
        module, spec = self._module(rows), self._packing(rows, matrix).spec
        inputs = matrix.in_features
        scales, zeros = self._scales(module), self._zeros(module)
        with np.errstate(over="ignore", invalid="ignore"):
            grouped = {"scales": scales.astype(np.float16), "biases": (-zeros * scales).astype(np.float16)}
        packed: dict[Field, npt.NDArray[Any]] = {"weight": self._rows(module)}
        for field in ("scales", "biases"):
            if not np.isfinite(grouped[field]).all():
                raise ConversionError(
                    f"{tensor_place(self, matrix, expert)} has {field} beyond float16's range, or not finite"
                )
            packed[field] = np.repeat(grouped[field].T, self._group(inputs) // spec.group_size, axis=1)
        return packed

    def _decode(self, rows: Rows, out: Floats) -> None:
        module, inputs = self._module(rows), out.shape[1]
        words, groups = self._rows(module), self._groups(module, inputs)
        scales, zeros = (np.ascontiguousarray(values.T) for values in (self._scales(module), self._zeros(module)))
        in_order = np.array_equal(groups, self._in_order(inputs))
        for block in row_blocks(*out.shape):
            values, own = out[block], (zeros[block], scales[block])
            values[:] = unpack(words[block], self.bits)
            if in_order:
                values = values.reshape(len(values), -1, self._group(inputs))
                zero, scale = (part[:, :, None] for part in own)
            else:
                zero, scale = (part[:, groups] for part in own)
            values -= zero
            # What a scale that is not finite makes of them is refused by name later.
            with np.errstate(over="ignore", invalid="ignore"):
                values *= scale

    def _packing(self, rows: Rows, matrix: Matrix) -> NativePacking:
        module = self._module(rows)
        name = f"{self.method} {self.bits}-bit g{self._group(matrix.in_features)}"
        fitting = [g for g in AFFINE_GROUP_SIZES if self._group(matrix.in_features) % g == 0]
        plain = np.array_equal(self._groups(module, matrix.in_features), self._in_order(matrix.in_features))
        if fitting and plain:
            return NativePacking(QuantizationSpec(self.bits, max(fitting)), True, name)
        return NativePacking(QuantizationSpec(8, 32), False, name if plain else f"{name}, act-order")

    def _check(self, rows: Rows, matrix: Matrix) -> None:
        module = self._module(rows)
        if rows.of != matrix.out_features:
            raise CheckpointError(
                f"{self.path}: module {module!r} has all experts in one tensor, which is not supported"
            )
        group = self._group(matrix.in_features)
        if matrix.in_features % group or matrix.in_features % 32 or matrix.out_features * self.bits % 32:
            raise CheckpointError(
                f"{self.path}: module {module!r} of {matrix.out_features} by {matrix.in_features} does not divide into "
                f"groups of {group} and whole words"
            )
        groups = matrix.in_features // group
        self._expect(f"{module}.qweight", self._words(matrix), ("I32", "U32"))
        self._expect(f"{module}.qzeros", (groups, matrix.out_features * self.bits // 32), ("I32", "U32"))
        self._expect(f"{module}.scales", (groups, matrix.out_features), ("F16", "BF16", "F32"))
        if f"{module}.g_idx" in self.checkpoint:
            self._expect(f"{module}.g_idx", (matrix.in_features,), ("I32", "U32"))

    def _used(self) -> set[str]:
        return super()._used() | {f"{module}.{field}" for module in self._modules for field in self.fields}

    def _main(self, rows: Rows) -> str:
        return f"{self._module(rows)}.qweight"

    @abstractmethod
    def _words(self, matrix: Matrix) -> tuple[int, int]:
        """Shape of ``qweight``."""

    @abstractmethod
    def _rows(self, module: str) -> npt.NDArray[np.uint32]:
        """``[out, words]``: the integers of each row of the matrix as one stream from the lowest bits on, as MLX packs them."""

    @abstractmethod
    def _zeros(self, module: str) -> Floats:
        """Zero points ``[groups, out]``."""

    def _groups(self, module: str, inputs: int) -> npt.NDArray[Any]:
        """The group of each input."""
        return self._in_order(inputs)

    def _in_order(self, inputs: int) -> npt.NDArray[Any]:
        return np.arange(inputs, dtype=np.uint32) // np.uint32(self._group(inputs))

    def _group(self, inputs: int) -> int:
        return inputs if self.group_size == -1 else self.group_size

    def _scales(self, module: str) -> Floats:
        name = f"{module}.scales"
        return convert(self._array(name), self.checkpoint[name].dtype, "F32")

    def _unknown(self, storage: Storage) -> ConversionError:
        """The error for a folder without settings, which this kind was asked to read."""
        if any(name.endswith(f".{self.packed[0]}") for name in StoredCheckpoint(storage)):
            return missing_settings(storage.path)
        return ConversionError(
            f"{storage.path} is not a {self.method} folder: no tensor is called NAME.{self.packed[0]}, and there are no "
            "settings; leave out --kind"
        )

    def _number(self, storage: Storage, entry: Any, name: str) -> int:
        value = entry.get(name)
        if not is_integer(value):
            raise ConversionError(
                f"{storage.path}: {self.method} with {name} = {value!r} is not supported; it must be an integer"
            )
        return value
