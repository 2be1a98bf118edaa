"""NVIDIA ModelOpt's Hugging Face export: FP8, MXFP8 and NVFP4, described in ``hf_quant_config.json``, config.json or both.

https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.sources.packed.coded import CodedModules
from mlx_mixtral_convert.sources.packed.modules import packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["ModelOptSource", "detect"]


def detect(storage: Storage) -> bool:
    """Whether a configuration says ModelOpt, by one of the names it has had for each algorithm."""
    return str(packing_entry(storage).get("quant_method", "")).split("_")[0] == "modelopt"


class ModelOptSource(CodedModules):
    """A folder whose modules are FP8 or NVFP4; those it excludes are plain."""

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        inner = entry.get("quantization")
        algorithm = str((inner if isinstance(inner, Mapping) else entry).get("quant_algo", "FP8"))
        if any(word in algorithm for word in ("INT4", "W4A16_AWQ", "W4A8_AWQ", "SQ", "W8A16")):
            raise ConversionError(
                f"{storage.path}: ModelOpt's {algorithm[:40]!r} is not supported; FP8, MXFP8 and NVFP4 can be converted, and so "
                "can the original"
            )
        super().__init__(storage)
