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
from mlx_mixtral_convert.packing.measure import unpack
from mlx_mixtral_convert.sources.packed.grouped import GroupedSource
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
    allowed_bits = (2, 3, 4, 8)

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        kind = entry.get("checkpoint_format") or entry.get("format", "gptq")
        kind = "marlin" if entry.get("is_marlin_format") else kind
        if kind not in _FORMATS:
            raise ConversionError(
                f"{storage.path}: GPTQ with checkpoint_format {str(kind)[:40]!r} is not supported; "
                f"{' or '.join(_FORMATS)} can be converted"
            )
        self._missing_from_zero = _FORMATS[kind]
        self._by_importance = entry.get("desc_act") is True
        super().__init__(storage)

    def _words(self, matrix: Matrix) -> tuple[int, int]:
        return matrix.in_features * self.bits // 32, matrix.out_features

    def _rows(self, module: str) -> npt.NDArray[np.uint32]:
        # Words hold inputs in order already, as a stream of bits: they only lie in a column instead of a row.
        return np.ascontiguousarray(self._array(f"{module}.qweight").T)

    def _zeros(self, module: str) -> Floats:
        words = self._array(f"{module}.qzeros")
        stored: Floats = unpack(words, self.bits).astype(np.float32)
        # A zero point of 0 wrapped around when one was taken from it.
        stored += self._missing_from_zero
        stored %= 2**self.bits
        return stored

    def _groups(self, module: str, inputs: int) -> npt.NDArray[Any]:
        name = f"{module}.g_idx"
        if name not in self.checkpoint:
            if self._by_importance and self._group(inputs) < inputs:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} is missing, but desc_act says that inputs are reordered; "
                    "use a file that has it"
                )
            return self._in_order(inputs)
        groups = self._array(name).reshape(-1)
        count = inputs // self._group(inputs)
        if groups.max() >= count:
            raise CheckpointError(
                f"{self.checkpoint[name].file}: tensor {name!r} names group {int(groups.view(np.int32).max())} "
                f"or one below 0; there are {count}"
            )
        return groups
