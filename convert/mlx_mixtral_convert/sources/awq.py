"""AWQ as AutoAWQ writes it: 4 bits, eight outputs to a word in the order its kernels read them.

``qweight`` int32 ``[in, out / 8]``, ``qzeros`` ``[in / g, out / 8]``, ``scales`` ``[in / g, out]``.
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlx_mixtral.errors import ConversionError
from mlx_mixtral.layout import Matrix
from mlx_mixtral_convert.sources.grouped import BLOCK_INPUTS, Codes, GroupedSource, fields_of_words
from mlx_mixtral_convert.sources.packed_modules import Floats, packing_entry
from mlx_mixtral_convert.sources.storage import Storage

__all__ = ["AwqSource", "detect", "open_storage"]

# Output o of eight lies in the bits of this number in its word.
_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]


def detect(storage: Storage) -> bool:
    """Whether the configuration says AWQ."""
    return packing_entry(storage).get("quant_method") == "awq"


def open_storage(storage: Storage) -> AwqSource:
    return AwqSource(storage)


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

    def _blocks(self, module: str, inputs: int) -> Iterator[tuple[int, Codes]]:
        for start in range(0, inputs, BLOCK_INPUTS):
            words = self._array(f"{module}.qweight", start, min(start + BLOCK_INPUTS, inputs))
            yield start, fields_of_words(words, 4)[..., _PLACE].reshape(len(words), -1)

    def _zeros(self, module: str) -> Floats:
        words = self._array(f"{module}.qzeros")
        return fields_of_words(words, 4)[..., _PLACE].reshape(len(words), -1).astype(np.float32)
