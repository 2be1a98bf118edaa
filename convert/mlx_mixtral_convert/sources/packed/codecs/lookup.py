"""bitsandbytes: 4-bit codes into a table of 16 floats, and rows of bytes with a scale each.

nf4 and fp4: ``weight`` ``out * in / 2`` bytes of any type, two codes a byte, the first in the high bits, over the flattened
matrix; a block of ``blocksize`` of them shares an ``absmax``; ``quant_map`` holds what the codes mean.
``absmax`` is float32, or bytes into ``nested_quant_map`` that blocks of ``nested_absmax`` scale, plus an offset.
``quant_state.bitsandbytes__nf4`` is JSON as bytes.
int8: ``weight`` I8 ``[out, in]``, ``SCB`` the largest magnitude of each row, at 127.
https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import parse_json
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral.weights.safetensors import is_count
from mlx_mixtral_convert.packing.measure import row_blocks
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.packed.codecs.module import (
    REQUANTISED,
    Codec,
    Floats,
    Module,
    affine_fields,
    affine_spec,
)

__all__ = ["ByteRowCodec", "LookupCodec"]

_STATE = "weight.quant_state.bitsandbytes__"
MAX_STATE_BYTES = 65_536


class LookupCodec(Codec):
    """nf4 and fp4."""

    codes = "weight"
    fields = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        f"{_STATE}nf4", f"{_STATE}fp4",
    )  # fmt: skip

    def __init__(self, module: Module, matrix: Matrix) -> None:
        super().__init__(module, matrix)
        self.kind = next((kind for kind in ("nf4", "fp4") if module.has(_STATE + kind)), "nf4")
        count = module.height * matrix.in_features
        # The bytes may be stored as any type and in any shape: `bnb_4bit_quant_storage` chooses.
        if module.rows.experts is not None or module.checkpoint[module.tensor("weight")].nbytes != -(-count // 2):
            raise module.wrong("weight", f"{-(-count // 2)} bytes of codes were expected")
        module.expect("weight.quant_map", ((16,),), FLOATS)
        state = module.shape(_STATE + self.kind)
        if len(state) != 1 or state[0] > MAX_STATE_BYTES:
            raise module.wrong(_STATE + self.kind, "a short text as bytes was expected")
        self.nested = module.has("weight.nested_absmax")
        if self.nested:
            module.expect("weight.nested_quant_map", ((256,),), FLOATS)
        blocks = module.shape("weight.absmax")
        module.expect("weight.absmax", (blocks,), ("U8",) if self.nested else FLOATS)

    def look(self) -> None:
        _ = self._block
        if self.nested:
            self._check_nested()

    def decode(self, out: Floats) -> None:
        block, scales = self._block, self._absmax
        table = self.module.floats("weight.quant_map")
        first, width = self.module.rows.start * self.in_features, self.in_features
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                start, stop = first + rows.start * width, first + rows.stop * width
                raw = self._bytes(start // 2, -(-stop // 2))
                codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[start % 2 :][: stop - start]
                blocks = scales[start // block : -(-stop // block)]
                own = np.repeat(blocks, block)[start % block :][: stop - start]
                out[rows] = (table[codes] * own).reshape(-1, width)

    def packing(self) -> NativePacking:
        return NativePacking(REQUANTISED, False, f"bitsandbytes {self.kind}")

    def _bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Codes' bytes ``start`` to ``stop``."""
        raw = np.empty(stop - start, np.uint8)
        self.module.reader.read(self.module.checkpoint[self.module.tensor("weight")], raw.data, start)
        return raw

    @cached_property
    def _state(self) -> dict[str, Any]:
        info = self.module.checkpoint[self.module.tensor(_STATE + self.kind)]
        raw = self.module.whole(_STATE + self.kind)
        state = parse_json(f"{info.file}: tensor {info.name!r}", raw.tobytes())
        for name in ("blocksize", *(("nested_blocksize",) if self.nested else ())):
            if not is_count(state.get(name)) or not state[name]:
                raise CheckpointError(f"{info.file}: tensor {info.name!r} says {name} = {state.get(name)!r}")
        if self.nested and not isinstance(state.get("nested_offset"), (int, float)):
            raise CheckpointError(f"{info.file}: tensor {info.name!r} has no nested_offset")
        return state

    @property
    def _block(self) -> int:
        """Weights that share an absmax."""
        count, blocks = self.module.height * self.in_features, self.module.shape("weight.absmax")
        block: int = self._state["blocksize"]
        if blocks != (-(-count // block),):
            raise self.module.wrong("weight.absmax", f"{count} weights in blocks of {block} were expected")
        return block

    def _check_nested(self) -> None:
        (count,), block = self.module.shape("weight.absmax"), self._state["nested_blocksize"]
        if self.module.shape("weight.nested_absmax") != (-(-count // block),):
            raise self.module.wrong("weight.nested_absmax", f"{count} scales in blocks of {block} were expected")

    @property
    def _absmax(self) -> Floats:
        if not self.nested:
            return self.module.floats("weight.absmax")
        raw = self.module.whole("weight.absmax").reshape(-1)
        block, outer = self._state["nested_blocksize"], self.module.floats("weight.nested_absmax").reshape(-1)
        inner = self.module.floats("weight.nested_quant_map")[raw] * np.repeat(outer, block)[: len(raw)]
        return np.asarray(inner + np.float32(self._state["nested_offset"]), np.float32)


class ByteRowCodec(Codec):
    """int8, exactly MLX's 8 bits but for the scales."""

    codes = "weight"
    fields = ("weight", "SCB", "weight_format")

    def __init__(self, module: Module, matrix: Matrix) -> None:
        super().__init__(module, matrix)
        module.expect("weight", ((module.height, matrix.in_features),), ("I8",))
        module.expect("SCB", ((module.height,), (module.height, 1)), FLOATS)

    def decode(self, out: Floats) -> None:
        scales = self._scales()
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in row_blocks(*out.shape):
                out[rows] = self.module.array("weight", rows.start, rows.stop).view(np.int8)
                out[rows] *= scales[rows]

    def packing(self) -> NativePacking:
        spec = affine_spec(8, self.in_features, self.in_features)
        return NativePacking(spec or REQUANTISED, spec is not None, "bitsandbytes int8")

    def packed(self, place: str) -> dict[Field, npt.NDArray[Any]]:
        raw = self.module.array("weight", 0, self.out_features)
        scales = np.repeat(self._scales(), self.in_features // self.packing().spec.group_size, axis=1)
        words = np.ascontiguousarray(raw ^ np.uint8(0x80)).view(np.uint32)
        return affine_fields(words, scales, 128.0, place)

    def _scales(self) -> Floats:
        """``[out, 1]``."""
        rows = slice(self.module.first, self.module.first + self.out_features)
        return (self.module.floats("SCB").reshape(-1, 1) / np.float32(127))[rows]
