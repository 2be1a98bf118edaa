"""Packed fields of matrices: what values they stand for, blocks of them, and what an expert of them gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.calibration.layer import swiglu, times
from mlx_mixtral_convert.calibration.states import States

__all__ = [
    "HiddenUnits",
    "PackedExpert",
    "PackedFields",
    "columns_of",
    "dequantized",
    "hidden_blocks",
    "joined",
    "rows_of",
]

# Hidden units at once; with their gradients 8x7B's are 16 bytes for each of 12.6 million numbers.
UNITS = 1024

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


def hidden_blocks(units: int) -> list[slice]:
    """Runs of hidden units, each at most ``UNITS`` and a multiple of 128 (the largest group) but perhaps the last."""
    return [slice(start, min(start + UNITS, units)) for start in range(0, units, UNITS)]


@dataclass(frozen=True)
class PackedExpert:
    """Gate, up and down in packed form, of which only a block of hidden units is held as numbers.

    Args:
        units: how many hidden units there are.
        packed, specs: of gate and up, and of down if ``__call__`` is wanted.
    """

    units: int
    packed: Sequence[PackedFields]
    specs: Sequence[QuantizationSpec | None]

    def hidden(self, x: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """What gate and up make of ``x [n, D]``, block by block, ``[n, units]``."""
        return ((units, self.some_hidden(x, units)) for units in hidden_blocks(self.units))

    def some_hidden(self, x: mx.array, units: slice) -> mx.array:
        """One block of it."""
        gate, up = (dequantized(rows_of(self.packed[place], units), self.specs[place]) for place in (0, 1))
        inner = swiglu(times(x, gate), times(x, up))
        mx.eval(inner)
        return inner

    def __call__(self, x: mx.array) -> mx.array:
        """The expert's output ``[n, D]``."""
        out = mx.zeros(x.shape)
        for units, inner in self.hidden(x):
            down = dequantized(columns_of(self.packed[2], units, self.units), self.specs[2])
            out = out + times(inner, down)
            mx.eval(out)
        return out


class HiddenUnits:
    """Hidden units of an expert's tokens ``[n, F]`` float32, computed once: on the disk, as ``States`` are.

    They come block by block, and of each block a piece of the tokens after the other.
    """

    def __init__(self, units: int, tokens: int, folder: Path | None) -> None:
        self.units, self._tokens = units, tokens
        self._width = min(units, UNITS)
        self._held = States(1, self._width, folder)

    def append(self, inner: mx.array) -> None:
        """The next piece ``[n, units]`` of the block at hand."""
        missing = self._width - inner.shape[1]  # the last block may be narrower
        self._held.append(mx.pad(inner, [(0, 0), (0, missing)])[:, None])

    def of(self, piece: slice, units: slice | None = None) -> mx.array:
        """Of a piece of the tokens one of ``hidden_blocks``, or all."""
        if units is None:
            return mx.concatenate([self.of(piece, block) for block in hidden_blocks(self.units)], axis=1)
        start = units.start // UNITS * self._tokens
        found = self._held.rows(slice(start + piece.start, start + piece.stop))
        return mx.contiguous(found[:, : units.stop - units.start])

    def close(self) -> None:
        self._held.close()
