"""FP8 as AutoFP8, FBGEMM, transformers and DeepSeek's tools write it: one scale a tensor, a row or a block."""

from __future__ import annotations

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.sources.packed.coded import CodedModules
from mlx_mixtral_convert.sources.packed.modules import packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["Fp8Source", "detect"]

_METHODS = ("fp8", "fbgemm_fp8", "mxfp8")


def detect(storage: Storage) -> bool:
    """Whether the configuration says FP8."""
    return packing_entry(storage).get("quant_method") in _METHODS


class Fp8Source(CodedModules):
    """A folder of FP8 weights; modules the configuration ignores are plain."""

    def __init__(self, storage: Storage) -> None:
        size = packing_entry(storage).get("weight_block_size")
        self._sizes: list[tuple[int, int]] = []
        if size is not None:
            if not isinstance(size, list) or len(size) != 2 or not all(is_integer(n) and n > 0 for n in size):
                raise ConversionError(
                    f"{storage.path}: config.json: weight_block_size is {str(size)[:60]}; a number of rows and "
                    "a number of columns were expected, as in [128, 128]"
                )
            self._sizes.append((size[0], size[1]))
        super().__init__(storage)

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        return self._sizes
