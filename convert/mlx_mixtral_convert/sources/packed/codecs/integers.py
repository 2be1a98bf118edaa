"""Integers of 1 to 8 bits in words: compressed-tensors' ``pack-quantized``.

``weight_packed`` I32 ``[out, words]``: codes plus 2^(bits - 1), the first in the lowest bits. Earlier releases put
``32 // bits`` codes into a word and left the rest of its bits empty, later ones let codes straddle words; where both differ,
the number of words tells. ``weight_scale`` ``[out, groups]``, ``[out, 1]`` or one number; ``weight_zero_point`` packed in the
same way along the outputs, ``[words, groups]``, or I8 ``[out, groups]``; ``weight_g_idx`` ``[in]`` where inputs are ordered by
importance. ``w = (q - zero) * scale``. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral_convert.packing.codes import pack_rows
from mlx_mixtral_convert.packing.measure import row_blocks, unpack
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.codecs.module import (
    REQUANTISED,
    Codec,
    Floats,
    Module,
    affine_fields,
    affine_spec,
)

__all__ = ["IntegerCodec", "word_counts"]

Codes = npt.NDArray[np.uint8]


class IntegerCodec(Codec):
    """Words of ``bits``-wide codes."""

    codes = "weight_packed"
    fields = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, module: Module, matrix: Matrix, bits: int) -> None:
        super().__init__(module, matrix)
        self.bits, height = bits, module.height
        module.expect(
            "weight_packed",
            tuple((height, count) for count in word_counts(matrix.in_features, bits)),
            ("I32", "U32"),
        )
        self.spaced = module.shape("weight_packed")[-1] != -(-matrix.in_features * bits // 32)
        if (shape := module.shape("weight_scale")) in ((), (1,), (1, 1), (height,), (height, 1)):
            self.groups = 1
        elif len(shape) == 2 and shape[0] == height and shape[1] and matrix.in_features % shape[1] == 0:
            self.groups = shape[1]
        else:
            raise module.wrong("weight_scale", "one number, or one per row or group of inputs, was expected")
        module.expect("weight_scale", (shape,), FLOATS)
        if module.has("weight_zero_point"):
            groups = self.groups
            plain = ((height, groups), *(((height,), (1,)) if groups == 1 else ()))
            packed = tuple((count, groups) for count in word_counts(height, bits))
            whole = module.dtype("weight_zero_point") == "I8"
            module.expect("weight_zero_point", plain if whole else packed, ("I8", "I32", "U32"))
        if module.has("weight_g_idx"):
            module.expect("weight_g_idx", ((matrix.in_features,),), ("I32", "U32"))

    @property
    def group(self) -> int:
        return self.in_features // self.groups

    def decode(self, out: Floats) -> None:
        scales, zeros, order = self._scales(), self._zeros(), self._order()
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                values = out[rows]
                values[:] = self._codes(rows.start, rows.stop)
                if order is None:
                    values = values.reshape(len(values), self.groups, -1)
                    values -= zeros[rows, :, None]
                    values *= scales[rows, :, None]
                else:
                    values -= zeros[rows][:, order]
                    values *= scales[rows][:, order]

    def packing(self) -> NativePacking:
        symmetric = not self.module.has("weight_zero_point")
        name = f"int{self.bits} g{self.group}{'' if symmetric else ' with zero points'}"
        if self._order() is not None:
            return NativePacking(REQUANTISED, False, f"{name}, act-order")
        if (spec := affine_spec(self.bits, self.group, self.in_features)) is None:
            return NativePacking(REQUANTISED, False, name)
        return NativePacking(spec, True, name, symmetric and self.module.dtype("weight_scale") == "F16")

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        spec = self.packing().spec
        words = self.module.array("weight_packed", 0, self.out_features)
        if spec.bits != self.bits or words.shape[1] != spec.packed_columns(self.in_features):
            words = np.empty((self.out_features, spec.packed_columns(self.in_features)), np.uint32)
            for rows in row_blocks(self.out_features, self.in_features):
                words[rows] = pack_rows(self._codes(rows.start, rows.stop), spec.bits)
        scales, zeros = (
            np.repeat(part, self.group // spec.group_size, axis=1) for part in (self._scales(), self._zeros())
        )
        return affine_fields(words, scales, zeros, place)

    def _codes(self, start: int, stop: int) -> Codes:
        return self._unpacked(self.module.array("weight_packed", start, stop), self.in_features)

    def _unpacked(self, words: npt.NDArray[np.uint32], count: int) -> Codes:
        """The first ``count`` codes of each row of words."""
        if self.spaced:
            shifts = np.arange(32 // self.bits, dtype=np.uint32) * np.uint32(self.bits)
            apart = words[..., None] >> shifts & np.uint32(2**self.bits - 1)
            return apart.astype(np.uint8).reshape(len(words), -1)[:, :count]
        # Whole runs of 32 codes, so that rows may be read as streams of bits.
        if short := -words.shape[1] % self.bits:
            words = np.pad(words, ((0, 0), (0, short)))
        return unpack(words, self.bits)[:, :count]

    def _own(self, values: npt.NDArray[Any]) -> Floats:
        """Rows of this matrix among the module's, ``[out, groups]``."""
        grid = np.broadcast_to(values.reshape(-1, self.groups), (self.module.height, self.groups))
        return grid[self.module.first : self.module.first + self.out_features].astype(np.float32)

    def _scales(self) -> Floats:
        return self._own(self.module.floats("weight_scale"))

    def _zeros(self) -> Floats:
        middle = 2 ** (self.bits - 1)
        if not self.module.has("weight_zero_point"):
            return np.full((self.out_features, self.groups), middle, np.float32)
        raw = self.module.whole("weight_zero_point")
        if self.module.dtype("weight_zero_point") == "I8":
            return self._own(raw.view(np.int8).astype(np.float32) + middle)
        return self._own(self._unpacked(np.ascontiguousarray(raw.T), self.module.height).T)

    def _order(self) -> npt.NDArray[np.int64] | None:
        """The group of each input, None where they are in order."""
        if not self.module.has("weight_g_idx"):
            return None
        groups = self.module.whole("weight_g_idx").view(np.int32).astype(np.int64)
        # What was allocated and never filled.
        if (groups == -1).all() or np.array_equal(groups, np.arange(self.in_features) // self.group):
            return None
        if groups.min() < 0 or groups.max() >= self.groups:
            info = self.module.checkpoint[self.module.tensor("weight_g_idx")]
            wrong = int(groups.min()) if groups.min() < 0 else int(groups.max())
            raise CheckpointError(f"{info.file}: tensor {info.name!r} names group {wrong}; there are {self.groups}")
        return groups


def word_counts(count: int, bits: int) -> tuple[int, ...]:
    """Words that ``count`` codes take: straddling, and whole codes to a word."""
    return tuple(dict.fromkeys((-(-count * bits // 32), -(-count // (32 // bits)))))
