"""compressed-tensors, what llm-compressor writes: each module's scheme in ``config_groups``, its tensors by format.

https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.sources.packed.codecs.integers import IntegerCodec, word_counts
from mlx_mixtral_convert.sources.packed.codecs.module import Codec, Module
from mlx_mixtral_convert.sources.packed.coded import CodedModules
from mlx_mixtral_convert.sources.packed.modules import packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["CompressedSource", "detect"]

FORMATS = (
    "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


def detect(storage: Storage) -> bool:
    """Whether the configuration says compressed-tensors."""
    return packing_entry(storage).get("quant_method") == "compressed-tensors"


class CompressedSource(CodedModules):
    """A folder of any format but the sparse ones."""

    def __init__(self, storage: Storage) -> None:
        entry = packing_entry(storage)
        groups = entry.get("config_groups")
        self._groups = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
        formats = [entry.get("format", "dense"), *(group.get("format") or "dense" for group in self._groups)]
        sparsity = entry.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity:
            formats.append(sparsity.get("format", "dense"))
        for kind in formats:
            if kind not in FORMATS:
                raise ConversionError(
                    f"{storage.path}: compressed-tensors format {str(kind)[:40]!r} is not supported; "
                    f"{', '.join(FORMATS[1:-1])} can be converted, and so can the original"
                )
        if _transforms(entry):
            raise ConversionError(
                f"{storage.path}: the weights are rotated (transform_config), which the model would have to undo; "
                "convert from the original"
            )
        self._path = storage.path
        super().__init__(storage)

    def _codec(self, module: Module, matrix: Matrix) -> Codec:
        if module.has("weight_packed") and module.dtype("weight_packed") in ("I32", "U32"):
            return IntegerCodec(module, matrix, self._bits(module, matrix))
        return super()._codec(module, matrix)

    def _bits(self, module: Module, matrix: Matrix) -> int:
        """Which of the schemes' numbers of bits a module has; its shape says so, whatever names the targets are."""
        named = sorted({bits for bits in self._of_weights("num_bits") if is_integer(bits) and 1 <= bits <= 8})
        if not named:
            raise ConversionError(
                f"{self._path}: config.json: module {module.name!r} is packed, but config_groups has no "
                "num_bits from 1 to 8 for it; download config.json again"
            )
        width = module.shape("weight_packed")[-1]
        return next((bits for bits in named if width in word_counts(matrix.in_features, bits)), named[-1])

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        pairs = (size for size in self._of_weights("block_structure") if isinstance(size, list) and len(size) == 2)
        return [(size[0], size[1]) for size in pairs if all(is_integer(n) and n > 0 for n in size)]

    def _of_weights(self, key: str) -> Iterator[Any]:
        """What the schemes say of weights under a key."""
        for group in self._groups:
            if isinstance(weights := group.get("weights"), Mapping):
                yield weights.get(key)


def _transforms(entry: Mapping[str, Any]) -> bool:
    config = entry.get("transform_config")
    return isinstance(config, Mapping) and bool(config.get("config_groups"))
