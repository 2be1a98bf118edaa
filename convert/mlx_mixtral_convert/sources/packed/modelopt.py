"""NVIDIA ModelOpt's Hugging Face export: FP8, INT8, MX types, NVFP4 and W4A16_AWQ.

It is described in ``hf_quant_config.json``, in config.json, or in both.

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


# Two scales for 4 bits, weights beside low-rank matrices, Hadamard rotations.
_OTHER = ("W4A8_AWQ", "NVFP4_SVDQUANT", "NVFP4_ROTATE")


class ModelOptSource(CodedModules):
    """A folder whose modules are packed in any of these; those it excludes are plain."""

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        inner = entry.get("quantization")
        algorithm = str((inner if isinstance(inner, Mapping) else entry).get("quant_algo", "FP8"))
        if algorithm.upper() in _OTHER:
            raise ConversionError(
                f"{storage.path}: ModelOpt's {algorithm[:40]!r} is not supported; FP8, INT8, W4A16_AWQ, MXFP4, MXFP8 and NVFP4 "
                "can be converted, and so can the original"
            )
        super().__init__(storage)
