"""GGUF files of Mixtral, Mistral and Llama: merged and per-expert tensors, one file or a split set, every type.

llama.cpp pairs neighbouring features in its rotary embedding, so its converter reordered the rows of q and k. That is
undone here, on whole rows: blocks run along the columns, and a row of them moves as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Norm, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy, convert
from mlx_mixtral.weights.unused import bias_notes, is_zero
from mlx_mixtral_convert.packing.transcode import AFFINE, MICROFLOATS, transcode, transcode_floats
from mlx_mixtral_convert.packing.values import NativePacking, Values
from mlx_mixtral_convert.sources.base import SourceFiles, read_companions, tensor_place
from mlx_mixtral_convert.sources.gguf.config import hf_entries
from mlx_mixtral_convert.sources.gguf.files import check_split, gguf_files, model_files
from mlx_mixtral_convert.sources.gguf.header import LocatedTensor, is_gguf, read_header
from mlx_mixtral_convert.sources.gguf.names import gguf_name
from mlx_mixtral_convert.sources.gguf.rope import ROPE_TENSORS
from mlx_mixtral_convert.sources.gguf.types import dequantize, native_packing
from mlx_mixtral_convert.sources.gguf.vocabulary import tokenizer_files
from mlx_mixtral_convert.sources.row_order import part_halves, rotary_heads
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["GgufSource", "detect"]

Bytes = npt.NDArray[np.uint8]

MAX_ROPE_BYTES = 2**16
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")


def detect(storage: Storage) -> bool:
    """Whether the file named is GGUF or, where none is, all weights are."""
    if storage.named is not None:
        return is_gguf(storage, storage.named)
    return bool(gguf_files(storage)) and not any(file.suffix in _OTHER_WEIGHTS for file in storage.glob("*"))


@dataclass(frozen=True)
class _ExpertRows:
    """One expert of a matrix: rows of a tensor."""

    tensor: LocatedTensor
    start: int
    label: str


class GgufSource:
    """A GGUF model; the heads of its files are read and checked here, weights by byte range when they are asked for.

    Raises:
        CheckpointError: damaged or truncated, a tensor missing, left over or of another shape, a part of a split set missing,
            several models in a folder.
        ConfigError: another architecture, or a key that changes the computation.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        paths = model_files(storage)
        headers = [read_header(file, storage) for file in paths]
        check_split(headers)
        self._head = headers[0]
        self.path, self.folder = self._head.path, storage.folder
        self._own_folder = storage.named is None
        self._tensors: dict[str, LocatedTensor] = {}
        for header in headers:
            for name, tensor in header.tensors.items():
                if name in self._tensors:
                    raise CheckpointError(f"{header.path}: tensor {name!r} is in another file of the set too")
                self._tensors[name] = tensor
        embedding = self._tensor("token_embd.weight")
        tied = "output.weight" not in self._tensors
        self._used: set[str] = set()
        rope = self._rope_tensors()
        self.entries: Mapping[str, Any] = hf_entries(self._head, embedding.rows, tied=tied, rope_tensors=rope)
        self.config = MixtralConfig.from_hf(self.entries)
        for name, factors in rope.items():
            if factors.size != self.config.head_dim // 2:
                raise CheckpointError(
                    f"{self.path}: tensor '{name}.weight' has {factors.size} values; the configuration calls for "
                    f"{self.config.head_dim // 2}"
                )
        self._parts = {matrix.path: self._find(matrix) for matrix in matrices(self.config)}
        self._norms = {norm.path: self._find_norm(norm) for norm in norms(self.config)}
        self._fetched = "", 0, np.empty((0, 0), np.uint8)
        self.files = SourceFiles(storage, list(paths))
        self._refuse_leftovers()

    def dtype(self, matrix: Matrix) -> str:
        kinds = self._kinds(matrix)
        return kinds[0] if len(kinds) == 1 and kinds[0] in FLOATS else "F32"

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        return self._norms[item.path].name if isinstance(item, Norm) else self._parts[item.path][expert].label

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        return self._norms[item.path].file if isinstance(item, Norm) else self._parts[item.path][expert].tensor.file

    def read(self, matrix: Matrix, expert: int, scratch: Bytes) -> Values:
        kind, shape = self._parts[matrix.path][expert].tensor.kind, (matrix.out_features, matrix.in_features)
        if kind.name == self.dtype(matrix):
            raw = scratch[: shape[0] * shape[1] * kind.nbytes].reshape(shape[0], -1)
            return Values(as_numpy(self._raw(matrix, expert, raw), kind.name), kind.name)
        values = scratch[: 4 * shape[0] * shape[1]].view(np.float32).reshape(shape)
        raw = self._raw(matrix, expert)
        if self._storage.ahead_bytes:
            # Fetched once, whether an exact conversion asks for the integers too or not.
            self._fetched = matrix.path, expert, raw
        if kind.name in FLOATS:
            values[:] = convert(as_numpy(raw, kind.name), kind.name, "F32")
        else:
            dequantize(raw, kind.name, values)
        return Values(values, "F32")

    def read_norm(self, norm: Norm) -> Values:
        tensor = self._norms[norm.path]
        raw = self._pread(tensor, 0, np.empty((1, tensor.nbytes), np.uint8))
        return Values(as_numpy(raw, tensor.kind.name), tensor.kind.name)

    def native(self, matrix: Matrix) -> NativePacking | None:
        kinds = self._kinds(matrix)
        packings = [native_packing(kind) for kind in kinds]
        if len(kinds) == 1 or not any(packings):
            return packings[0]
        # The experts of a matrix have one packing in MLX.
        return NativePacking(QuantizationSpec(8, 32), False, " and ".join(kinds))

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        part, raw = self._parts[matrix.path][expert], self.read_blocks(matrix, expert)
        kind, place = part.tensor.kind.name, tensor_place(self, matrix, expert)
        if (floats := MICROFLOATS.get(kind)) is not None:
            return transcode_floats(raw, floats, place)
        return transcode(raw, AFFINE[kind], place)

    def type_name(self, matrix: Matrix) -> str:
        """GGUF's name for the type of a matrix; of several, where its experts differ."""
        return " and ".join(self._kinds(matrix))

    def read_blocks(self, matrix: Matrix, expert: int) -> Bytes:
        """One expert as it lies in the file, ``[out_features, row_bytes]``, rows of q and k in the model's order."""
        path, number, raw = self._fetched
        return raw if (path, number) == (matrix.path, expert) else self._raw(matrix, expert)

    def small_files(self) -> dict[str, bytes]:
        """Tokenizer, its settings and the chat template out of the keys; a licence that lies in the model's own folder."""
        licences = read_companions(self.folder, "LICENSE*") if self._own_folder else {}
        return tokenizer_files(self._head) | licences

    def close(self) -> None:
        self._storage.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _kinds(self, matrix: Matrix) -> list[str]:
        """The types of a matrix's experts, which old files keep in tensors of their own."""
        return list(dict.fromkeys(part.tensor.kind.name for part in self._parts[matrix.path]))

    def _raw(self, matrix: Matrix, expert: int, out: Bytes | None = None) -> Bytes:
        """The rows of one expert ``[out_features, row_bytes]`` in the order of the half-rotation form."""
        part = self._parts[matrix.path][expert]
        if out is None:
            out = np.empty((matrix.out_features, part.tensor.row_bytes), np.uint8)
        self._pread(part.tensor, part.start * part.tensor.row_bytes, out)
        if (heads := rotary_heads(matrix, self.config)) is not None:
            part_halves(out, heads)
        return out

    def _pread(self, tensor: LocatedTensor, skip: int, out: Bytes) -> Bytes:
        self._storage.read_into(tensor.file, out.reshape(-1).data, tensor.offset + skip)
        return out

    def _tensor(self, name: str) -> LocatedTensor:
        if (tensor := self._tensors.get(name)) is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return tensor

    def _find(self, matrix: Matrix) -> list[_ExpertRows]:
        names = _names(matrix, self.config.is_dense, self._tensors)
        merged = names[0].endswith("_exps.weight")
        found = [self._tensor(name) for name in names]
        for tensor in found:
            expected = matrix.shape if merged else matrix.shape[-2:]
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}; "
                    f"the configuration calls for {list(expected)}"
                )
        self._used.update(names)
        if merged:
            rows, name = matrix.out_features, found[0].name
            return [_ExpertRows(found[0], e * rows, f"{name}[{e}]") for e in range(matrix.num_experts or 1)]
        return [_ExpertRows(tensor, 0, tensor.name) for tensor in found]

    def _find_norm(self, norm: Norm) -> LocatedTensor:
        name = f"{gguf_name(norm)}.weight"
        tensor = self._tensor(name)
        if tensor.shape != (norm.size,) or tensor.kind.name not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is {tensor.kind.name} {list(tensor.shape)}; "
                f"the configuration calls for floats [{norm.size}]"
            )
        self._used.add(name)
        return tensor

    def _rope_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """What rotary frequencies are divided by, by tensor: old files have one a layer, all alike."""
        found: dict[str, npt.NDArray[np.float32]] = {}
        for name, tensor in self._tensors.items():
            if (kind := name.removesuffix(".weight").rpartition(".")[2]) not in ROPE_TENSORS:
                continue
            if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.nbytes > MAX_ROPE_BYTES:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is {tensor.kind.name} {list(tensor.shape)}; a divisor for each rotary "
                    "frequency was expected, in F32"
                )
            factors = self._pread(tensor, 0, np.empty(tensor.nbytes, np.uint8)).view(np.float32)
            if not np.array_equal(found.setdefault(kind, factors), factors, equal_nan=True):
                raise ConfigError(
                    f"{tensor.file}: tensor {name!r} differs from that of another layer; all layers must use "
                    "the same rotary frequencies"
                )
            self._used.add(name)
        return found

    def _refuse_leftovers(self) -> None:
        zeros = []
        for name in sorted(set(self._tensors) - self._used):
            tensor = self._tensors[name]
            if name.endswith(".bias") and tensor.kind.name in FLOATS:
                raw = self._pread(tensor, 0, np.empty((1, tensor.nbytes), np.uint8))
                if is_zero(as_numpy(raw, tensor.kind.name), tensor.kind.name):
                    zeros.append(name)
                    continue
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is a bias that is not zero; the model computed here has no place for it"
                )
            # Old files store the rotary frequencies, which follow from the configuration.
            if not name.endswith(".attn_rot_embd"):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} has no place in the model its keys describe; "
                    "check llama.block_count and llama.expert_count"
                )
        self.notes = bias_notes(zeros)


def _names(matrix: Matrix, dense: bool, present: Mapping[str, LocatedTensor]) -> list[str]:
    """The tensors a matrix lies in: one, or one an expert where they are kept apart."""
    name = gguf_name(matrix)
    if dense or matrix.num_experts is None:
        return [f"{name}.weight"]
    apart = [f"{name}.{expert}.weight" for expert in range(matrix.num_experts)]
    return apart if any(name in present for name in apart) else [f"{name}_exps.weight"]
