"""Folders whose modules say by their tensors how they are packed: FP8, compressed-tensors, ModelOpt and bitsandbytes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Rows
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert.packing.values import NativePacking
from mlx_mixtral_convert.sources.base import tensor_place
from mlx_mixtral_convert.sources.packed.codecs.lookup import ByteRowCodec, LookupCodec
from mlx_mixtral_convert.sources.packed.codecs.microfloats import MicrofloatCodec
from mlx_mixtral_convert.sources.packed.codecs.module import Codec, Module
from mlx_mixtral_convert.sources.packed.codecs.rowpairs import RowPairCodec
from mlx_mixtral_convert.sources.packed.codecs.scaled import ScaledCodec
from mlx_mixtral_convert.sources.packed.modules import THREADS, Floats, PackedModules
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["CodedModules"]

# What serves activations: it changes nothing where they are not quantised.
_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "input_g_idx", "activation_scale",
    "activation_scale_ub", "output_scale", "output_zero_point",
)  # fmt: skip
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.\w+")
_STACKED = (".gate_up_proj_scale_inv", ".down_proj_scale_inv")


class CodedModules(PackedModules):
    """A folder that may mix ways of packing: each module gets the codec its tensors call for.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
        ConversionError: a way of packing that is not read here.
    """

    packed = ("weight_packed", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax")

    def __init__(self, storage: Storage) -> None:
        self._codecs: dict[tuple[str, int], Codec] = {}
        self._packings: dict[tuple[str, int], NativePacking] = {}
        super().__init__(storage)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
            list(pool.map(lambda codec: codec.look(), self._codecs.values()))

    def native(self, matrix: Matrix) -> NativePacking | None:
        found = [rows for rows in self._matrices[matrix.path] if self._is_packed(rows)]
        # Some ask for a small tensor of each expert.
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
            list(pool.map(lambda rows: self._packing(rows, matrix), found))
        return super().native(matrix)

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        rows = self._matrices[matrix.path][expert]
        return self._codecs[self._key(rows)].packed(tensor_place(self, matrix, expert))

    def _codec(self, module: Module, matrix: Matrix) -> Codec:
        """The codec for the tensors a module has."""
        if module.has("weight.absmax"):
            return LookupCodec(module, matrix)
        if module.has("SCB"):
            return ByteRowCodec(module, matrix)
        if module.has("weight_packed"):
            return MicrofloatCodec(module, matrix)
        if module.dtype("weight") == "U8":
            pairs = module.shape("weight") == (module.height // 2, matrix.in_features)
            return RowPairCodec(module, matrix) if pairs else MicrofloatCodec(module, matrix)
        return ScaledCodec(module, matrix, self._blocks, self._stacked_scales(module, matrix))

    def _stacked_scales(self, module: Module, matrix: Matrix) -> Module | None:
        """Where the scales of an expert's module lie, if they are stacked though its weights are apart."""
        if (found := _EXPERT.fullmatch(module.name)) is None or module.has("weight_scale_inv"):
            return None
        projection, rows, count = matrix.path.rpartition(".")[2], matrix.out_features, matrix.num_experts or 1
        name = f"{found[1]}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        tall = rows if projection == "down_proj" else 2 * rows
        start = int(found[2]) * tall + rows * (projection == "up_proj")
        scales = Module(name, Rows(name, start, start + rows, count * tall, count), self.checkpoint, self._reader)
        return scales if scales.has("weight_scale_inv") else None

    @cached_property
    def _packed_names(self) -> set[str]:
        blocks = {name.removesuffix(end) for end in _STACKED for name in self.checkpoint if name.endswith(end)}
        apart = {name.removesuffix(".weight") for name in self.checkpoint if name.endswith(".weight")}
        experts = {name for name in apart if (found := _EXPERT.fullmatch(name)) and found[1] in blocks}
        return super()._packed_names | experts

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        """Rows and columns of blocks that share a scale, where the configuration names such."""
        return []

    def _check(self, rows: Rows, matrix: Matrix) -> None:
        module = Module(self._module(rows), rows, self.checkpoint, self._reader)
        self._codecs[self._key(rows)] = self._codec(module, matrix)

    def _decode(self, rows: Rows, out: Floats) -> None:
        self._codecs[self._key(rows)].decode(out)

    def _packing(self, rows: Rows, matrix: Matrix) -> NativePacking:
        key = self._key(rows)
        if key not in self._packings:
            self._packings[key] = self._codecs[key].packing()
        return self._packings[key]

    def _key(self, rows: Rows) -> tuple[str, int]:
        return self._module(rows), rows.start

    def _main(self, rows: Rows) -> str:
        codec = self._codecs[self._key(rows)]
        return codec.module.tensor(codec.codes)

    def _used(self) -> set[str]:
        used = super()._used()
        for codec in self._codecs.values():
            if isinstance(codec, ScaledCodec):
                used.add(codec.scaled.tensor(codec.scale))
            used |= {codec.module.tensor(field) for field in (*codec.fields, *_ACTIVATIONS)}
            self._refuse_bias(codec.module)
            used.add(codec.module.tensor("bias"))
        return used

    def _refuse_bias(self, module: Module) -> None:
        if module.has("bias") and module.whole("bias").any():
            info = self.checkpoint[module.tensor("bias")]
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} is a bias that is not zero; the model has no place for it"
            )
