"""One packed module: its tensors by field, and what every codec offers for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Rows
from mlx_mixtral.config.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import as_numpy, convert
from mlx_mixtral_convert.packing.values import NativePacking

__all__ = [
    "POWERS", "REQUANTISED", "Codec", "Floats", "Module", "affine_fields", "affine_spec", "powers_of_two",
]  # fmt: skip

Floats = npt.NDArray[np.float32]

REQUANTISED = QuantizationSpec(8, 32)
"""What values are rounded into that no packing of MLX holds."""
POWERS = ("U8", "F8_E8M0")
"""Types of scales that are powers of two, by their exponent plus 127."""
# Types numpy sees as bytes of the same size.
_SEEN_AS = {"I32": "U32", "F8_E4M3": "U8", "F8_E5M2": "U8", "F8_E8M0": "U8", "I8": "U8", "BOOL": "U8"}


@dataclass(frozen=True)
class Module:
    """The tensors ``NAME.FIELD`` of a module, of which one matrix is the rows ``rows``: all, one expert's, or a half.

    A stacked module has no field ``weight``: its codes are ``NAME`` itself and its scales ``NAME_scale_inv``.
    """

    name: str
    rows: Rows
    checkpoint: Checkpoint
    reader: CheckpointReader

    @property
    def height(self) -> int:
        """Rows of the whole module, of one expert where it is stacked."""
        return self.rows.of // (self.rows.experts or 1)

    @property
    def first(self) -> int:
        """Where the matrix starts among them."""
        return self.rows.start % self.height

    def tensor(self, field: str) -> str:
        """The name of a field's tensor."""
        dotted = f"{self.name}.{field}"
        if self.rows.experts is None or dotted in self.checkpoint:
            return dotted
        return self.name if field == "weight" else f"{self.name}_{field.removeprefix('weight_')}"

    def has(self, field: str) -> bool:
        return self.tensor(field) in self.checkpoint

    def dtype(self, field: str) -> str:
        return self.checkpoint[self.tensor(field)].dtype

    def shape(self, field: str) -> tuple[int, ...]:
        """Shape of a field, of one expert's share where the module is stacked."""
        info = self.checkpoint[self.tensor(field)]
        if self.rows.experts is None:
            return info.shape
        if not info.shape or info.shape[0] != self.rows.experts:
            raise self.wrong(field, f"{self.rows.experts} experts were expected")
        return info.shape[1:]

    def expect(self, field: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> None:
        """Raise CheckpointError unless a field has one of these shapes and types."""
        if self.shape(field) not in shapes:
            listed = " or ".join(str(list(shape)) for shape in shapes)
            raise self.wrong(field, f"the configuration calls for {listed}")
        if (dtype := self.dtype(field)) not in dtypes:
            info = self.checkpoint[self.tensor(field)]
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {dtype}; {', '.join(dtypes)} was expected"
            )

    def wrong(self, field: str, expected: str) -> CheckpointError:
        info = self.checkpoint[self.tensor(field)]
        return CheckpointError(f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; {expected}")

    def array(self, field: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` of the matrix in a field that has a row for each; integers unsigned."""
        info = self.checkpoint[self.tensor(field)]
        raw = self.reader.rows(info, self.rows.start + start, self.rows.start + stop)
        return as_numpy(raw, _SEEN_AS.get(info.dtype, info.dtype))

    def whole(self, field: str) -> npt.NDArray[Any]:
        """A field of the module, or of its expert, in its own shape; integers unsigned."""
        info, shape = self.checkpoint[self.tensor(field)], self.shape(field)
        expert = self.rows.start // self.height
        count, kind = int(np.prod(shape[:-1], dtype=np.int64)), _SEEN_AS.get(info.dtype, info.dtype)
        if self.rows.experts is not None and not shape:
            return as_numpy(self.reader.rows(info, 0, 1), kind)[0, expert]  # type: ignore[no-any-return]
        raw = self.reader.rows(info, expert * count, (expert + 1) * count)
        return as_numpy(raw, kind).reshape(shape)

    def floats(self, field: str) -> Floats:
        """The same of a float field, in float32."""
        return convert(np.atleast_1d(self.whole(field)), self.dtype(field), "F32")

    def scales(self, field: str) -> Floats:
        """The same of floats or of powers of two."""
        if self.dtype(field) in POWERS:
            return powers_of_two(self.whole(field))
        return self.floats(field)


class Codec(ABC):
    """Decodes one packed matrix, and moves its integers where MLX has a packing for them.

    Made when a source is opened, from headers alone.

    Raises:
        CheckpointError: a tensor of another shape or type than ``matrix`` calls for.
        ConversionError: a variant that is not read here.
    """

    codes: str
    """The field that holds the codes."""
    fields: tuple[str, ...]
    """Every field a module may have that is used, or known to change nothing."""

    def __init__(self, module: Module, matrix: Matrix) -> None:
        self.module, self.out_features, self.in_features = module, matrix.out_features, matrix.in_features

    def look(self) -> None:
        """Read and check what is small and must be known before anything is written."""
        return

    @abstractmethod
    def decode(self, out: Floats) -> None:
        """Fill ``out`` ``[out_features, in_features]``; what is not finite is refused by name later."""

    @abstractmethod
    def packing(self) -> NativePacking:
        """How MLX could hold it."""

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        """Of a module whose ``packing`` is exact: what ``PackedSource.read_packed`` gives. ``place`` is for messages.

        Codecs of which no packing is exact have none.
        """
        raise NotImplementedError


def affine_spec(bits: int, group: int, inputs: int) -> QuantizationSpec | None:
    """The affine packing that holds codes of ``bits`` bits in groups of ``group``, None where MLX has no such groups."""
    fitting = [size for size in AFFINE_GROUP_SIZES if group % size == 0 and inputs % size == 0]
    wide = min((have for have in AFFINE_BITS if have >= bits), default=None)
    return QuantizationSpec(wide, max(fitting)) if fitting and wide is not None else None


def affine_fields(
    words: npt.NDArray[np.uint32], scales: Floats, zeros: Floats | float, place: str
) -> dict[Field, npt.NDArray[Any]]:
    """MLX's fields of ``w = (q - zero) * scale``, scales and zero points ``[out, groups]``.

    Raises:
        ConversionError: float16 cannot hold a scale or bias.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        fields: Mapping[Field, npt.NDArray[Any]] = {
            "scales": scales.astype(np.float16),
            "biases": (-zeros * scales).astype(np.float16),
        }
    for field, array in fields.items():
        if not np.isfinite(array).all():
            raise ConversionError(f"{place} has {field} beyond float16's range, or not finite; convert without --exact")
    return {"weight": words, **fields}


def powers_of_two(exponents: npt.NDArray[Any]) -> Floats:
    """2^(e - 127) of bytes; 255 is NaN."""
    is_number = exponents != 255
    values = np.ldexp(np.float32(1), np.where(is_number, exponents, 127).astype(np.int32) - 127)
    return np.where(is_number, values, np.float32(np.nan)).astype(np.float32)
