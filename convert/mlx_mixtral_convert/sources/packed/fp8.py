"""FP8 (e4m3) weights with one scale a tensor or a row: compressed-tensors, AutoFP8, FBGEMM.

``weight`` F8_E4M3 ``[out, in]`` and ``weight_scale``, a scalar or ``[out]`` or ``[out, 1]``; w = weight * scale. Scales of
activations and of the KV cache are not needed. https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import re

import numpy as np

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.weights.dtypes import convert
from mlx_mixtral_convert.packing.measure import E4M3, row_blocks
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.modules import Floats, PackedModules, packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["Fp8Source", "detect"]

_METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8")
_CACHE_SCALE = re.compile(r"model\.layers\.\d+\.self_attn\.(kv_scale|[kv]_scale|[qkv]_proj\.output_scale)")


def detect(storage: Storage) -> bool:
    """Whether the configuration says FP8, or anything of compressed-tensors."""
    return packing_entry(storage).get("quant_method") in _METHODS


class Fp8Source(PackedModules):
    """A folder of FP8 weights; modules the configuration ignores are plain.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
        ConversionError: compressed-tensors in another format than float-quantized, or scales of blocks.
    """

    packed = "weight_scale"
    fields = ("weight", "weight_scale", "input_scale", "input_scale_ub", "activation_scale_ub")

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        kind = entry.get("format", "float-quantized")
        if kind not in ("float-quantized", "naive-quantized"):
            raise ConversionError(
                f"{storage.path}: compressed-tensors format {str(kind)[:40]!r} is not supported; "
                "float-quantized can be converted"
            )
        if entry.get("weight_block_size"):
            raise ConversionError(
                f"{storage.path}: FP8 with a scale for each block is not supported; convert from the original"
            )
        super().__init__(storage)

    def _check(self, module: str, matrix: Matrix) -> None:
        self._expect(f"{module}.weight", (matrix.out_features, matrix.in_features), ("F8_E4M3",))
        scale = self.checkpoint[f"{module}.weight_scale"]
        if scale.shape not in ((), (1,), (1, 1), (matrix.out_features,), (matrix.out_features, 1)):
            raise CheckpointError(
                f"{scale.file}: tensor {scale.name!r} has shape {list(scale.shape)}; one number, or one a row, was expected"
            )
        self._expect(scale.name, scale.shape, ("F32", "F16", "BF16"))

    def _decode(self, module: str, out: Floats) -> None:
        name = f"{module}.weight_scale"
        scale = convert(self._array(name).reshape(-1, 1), self.checkpoint[name].dtype, "F32")
        scales = np.broadcast_to(scale, (len(out), 1))
        # What is not finite is refused by name later.
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                np.multiply(E4M3[self._array(f"{module}.weight", rows.start, rows.stop)], scales[rows], out=out[rows])

    def _packing(self, module: str, matrix: Matrix) -> NativePacking:
        return NativePacking(QuantizationSpec(8, 32), False, "FP8 e4m3")

    def _used(self) -> set[str]:
        return super()._used() | {name for name in self.checkpoint if _CACHE_SCALE.fullmatch(name)}
