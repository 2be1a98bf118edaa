"""AWQ as AutoAWQ writes it: 4 bits, eight outputs to a word in the order its kernels read them.

``qweight`` int32 ``[in, out / 8]``, ``qzeros`` ``[in / g, out / 8]``, ``scales`` ``[in / g, out]``.
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.sources.packed.grouped import GroupedSource, fields_of_words
from mlx_mixtral_convert.sources.packed.modules import Floats, packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["AwqSource", "detect"]

# Inputs turned over at a time: a cache's worth.
BLOCK_INPUTS = 256
# Output o of eight lies in the bits of this number in its word.
_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]


def detect(storage: Storage) -> bool:
    """Whether the configuration says AWQ."""
    return packing_entry(storage).get("quant_method") == "awq"


class AwqSource(GroupedSource):
    """A folder of AWQ's ``gemm`` version."""

    method = "AWQ"
    allowed_bits = (4,)

    def __init__(self, storage: Storage) -> None:
        version = str(packing_entry(storage).get("version", "gemm"))
        if version.lower() != "gemm":
            raise ConversionError(
                f"{storage.path}: AWQ version {version[:40]!r} is not supported; gemm can be converted"
            )
        super().__init__(storage)

    def _words(self, matrix: Matrix) -> tuple[int, int]:
        return matrix.in_features, matrix.out_features // 8

    def _rows(self, module: str) -> npt.NDArray[np.uint32]:
        words = self._array(f"{module}.qweight")
        inputs, columns = words.shape
        rows = np.empty((columns, 8, inputs // 8), np.uint32)
        for start in range(0, inputs, BLOCK_INPUTS):
            # Eight inputs of eight outputs are a square of 4-bit numbers, a word a row: turned over, a word is one output's.
            block = words[start : start + BLOCK_INPUTS].reshape(-1, 8, columns)
            square = _turned([np.ascontiguousarray(block[:, row]) for row in range(8)])
            into = slice(start // 8, start // 8 + len(block))
            for output, place in enumerate(_PLACE):
                rows[:, output, into] = square[place].T
        return rows.reshape(8 * columns, -1)

    def _zeros(self, module: str) -> Floats:
        words = self._array(f"{module}.qzeros")
        return fields_of_words(words, 4)[..., _PLACE].reshape(len(words), -1).astype(np.float32)


def _turned(rows: list[npt.NDArray[np.uint32]]) -> list[npt.NDArray[np.uint32]]:
    """The transpose of a square of 4-bit numbers, eight words with the first number lowest, in place and elementwise.

    Halves, quarters and eighths change places (Hacker's Delight, section 7-3).
    """
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift = np.uint32(4 * distance)
        for first in (row for row in range(8) if not row & distance):
            upper, lower = rows[first], rows[first + distance]
            moved = upper >> shift
            moved ^= lower
            moved &= np.uint32(mask)
            lower ^= moved
            moved <<= shift
            upper ^= moved
    return rows
