"""GPTQ, both ways to store zero points, with inputs in order or grouped by importance (act-order).

``qweight`` int32 ``[in * bits / 32, out]`` packed along the input, ``qzeros`` ``[in / g, out * bits / 32]`` packed along the
output, ``scales`` ``[in / g, out]``, ``g_idx`` ``[in]``. The first format stores zero points minus one, ``gptq_v2`` as they
are. https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral_convert.sources.packed.grouped import GroupedSource, fields_of_words
from mlx_mixtral_convert.sources.packed.modules import Floats, packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["GptqSource", "detect"]

_FORMATS = {"gptq": 1, "gptq_v2": 0}


def detect(storage: Storage) -> bool:
    """Whether the configuration says GPTQ."""
    return packing_entry(storage).get("quant_method") == "gptq"


class GptqSource(GroupedSource):
    """A folder of GPTQ weights."""

    method = "GPTQ"
    allowed_bits = (2, 4, 8)

    def __init__(self, storage: Storage) -> None:
        kind = packing_entry(storage).get("checkpoint_format", "gptq")
        if kind not in _FORMATS:
            raise ConversionError(
                f"{storage.path}: GPTQ with checkpoint_format {str(kind)[:40]!r} is not supported; "
                f"{' or '.join(_FORMATS)} can be converted"
            )
        self._missing_from_zero = _FORMATS[kind]
        super().__init__(storage)

    def _words(self, matrix: Matrix) -> tuple[int, int]:
        return matrix.in_features * self.bits // 32, matrix.out_features

    def _rows(self, module: str) -> npt.NDArray[np.uint32]:
        # A word holds inputs in order already: it only lies in a column instead of a row.
        return np.ascontiguousarray(self._array(f"{module}.qweight").T)

    def _zeros(self, module: str) -> Floats:
        words = self._array(f"{module}.qzeros")
        stored: Floats = fields_of_words(words, self.bits).reshape(len(words), -1).astype(np.float32)
        # A zero point of 0 wrapped around when one was taken from it.
        stored += self._missing_from_zero
        stored %= 2**self.bits
        return stored

    def _groups(self, module: str, inputs: int) -> npt.NDArray[Any]:
        name = f"{module}.g_idx"
        if name not in self.checkpoint:
            return self._in_order(inputs)
        groups = self._array(name).reshape(-1)
        count = inputs // self._group(inputs)
        if groups.max() >= count:
            raise CheckpointError(
                f"{self.checkpoint[name].file}: tensor {name!r} names group {int(groups.view(np.int32).max())} "
                f"or one below 0; there are {count}"
            )
        return groups
