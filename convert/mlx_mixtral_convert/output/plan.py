"""The output before it exists: every file, tensor, shape and byte offset, from the configuration and the recipe alone."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from mlx_mixtral.config.layout import Matrix, Norm, fields_of, matrices, module_tensor, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationConfig, QuantizationSpec
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.packing.values import NativePacking

__all__ = ["INDEX_FILE", "Described", "Plan", "ShardPlan", "TensorPlan", "lay_out", "make_plan", "shard_files"]

# Name, safetensors dtype and shape of a tensor.
Described = tuple[str, str, tuple[int, ...]]

INDEX_FILE = "model.safetensors.index.json"
# Apple's page size: a tensor that starts on a page can be read, or mapped, without touching its neighbour.
ALIGNMENT_BYTES = 16384


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a shard; ``offset`` counts from the start of the file, ``dtype`` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardPlan:
    """One file: its header as bytes, and its tensors in file order, without holes."""

    file: str
    layer: int | None
    header: bytes
    tensors: Mapping[str, TensorPlan]
    matrices: tuple[Matrix, ...]
    norms: tuple[Norm, ...]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """All files of weights. ``dtype`` is the safetensors type of norms, scales and what stays unquantised.

    ``native`` is what an exact conversion knows of the packing its matrices have in the source; else it is empty.
    """

    config: MixtralConfig
    dtype: str
    specs: Mapping[str, QuantizationSpec | None]
    shards: tuple[ShardPlan, ...]
    native: Mapping[str, NativePacking] = dataclasses.field(default_factory=dict)

    def keeps(self, path: str) -> bool:
        """Whether a matrix takes the source's integers as they are."""
        packing = self.native.get(path)
        return packing is not None and packing.exact and packing.spec == self.specs[path]

    def exactness(self, path: str) -> str | None:
        """``exact``: not one value changes; ``rounded``: only scales and biases were; ``requantised``. None: not packed,
        or packed from floats."""
        packing = self.native.get(path)
        if packing is None or self.specs[path] is None:
            return None
        if not self.keeps(path):
            return "requantised"
        return "exact" if packing.lossless and self.dtype != "BF16" else "rounded"

    @property
    def output_bytes(self) -> int:
        """Size of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in matrices(self.config)) + sum(n.size for n in norms(self.config))

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """(part, parameters, bytes) of every matrix and norm."""
        for shard in self.shards:
            for matrix in shard.matrices:
                names = [module_tensor(matrix, name) for name in fields_of(self.specs[matrix.path])]
                yield matrix.part, matrix.parameters, sum(shard.tensors[name].nbytes for name in names)
            for norm in shard.norms:
                yield "norm", norm.size, shard.tensors[f"{norm.path}.weight"].nbytes

    def index(self) -> bytes:
        """The text of ``model.safetensors.index.json``."""
        weight_map = {name: shard.file for shard in self.shards for name in shard.tensors}
        entries = {"metadata": {"total_size": self.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(entries, indent=2) + "\n").encode()

    def quantization(self, default: QuantizationSpec | None) -> QuantizationConfig | None:
        """The ``quantization`` entry: ``default`` (else the packing of most weights) and what differs from it."""
        weights: Counter[QuantizationSpec] = Counter()
        for matrix in matrices(self.config):
            if (spec := self.specs[matrix.path]) is not None:
                weights[spec] += matrix.parameters
        if not weights:
            return None
        base = default if default is not None and default in weights else weights.most_common(1)[0][0]
        return QuantizationConfig(base, {path: spec for path, spec in self.specs.items() if spec != base})


def make_plan(
    config: MixtralConfig,
    specs: Mapping[str, QuantizationSpec | None],
    dtype: str,
    native: Mapping[str, NativePacking] | None = None,
) -> Plan:
    """Lay out one shard a decoder layer and a last one for embeddings, final norm and head."""
    shards = [_shard(*files, specs, dtype) for files in shard_files(config)]
    return Plan(config, dtype, specs, tuple(shards), native or {})


def shard_files(
    config: MixtralConfig,
) -> Iterator[tuple[str, int | None, tuple[Matrix, ...], tuple[Norm, ...]]]:
    """Name, layer, matrices and norms of each file: one a decoder layer, and a last one for embeddings, final norm and head."""
    layers: list[int | None] = [*range(config.num_hidden_layers), None]
    for number, layer in enumerate(layers, start=1):
        own = tuple(matrix for matrix in matrices(config) if matrix.layer == layer)
        own_norms = tuple(norm for norm in norms(config) if norm.layer == layer)
        yield f"model-{number:05}-of-{len(layers):05}.safetensors", layer, own, own_norms


def _shard(
    file: str,
    layer: int | None,
    own: tuple[Matrix, ...],
    own_norms: tuple[Norm, ...],
    specs: Mapping[str, QuantizationSpec | None],
    dtype: str,
) -> ShardPlan:
    described = [entry for matrix in own for entry in _tensors(matrix, specs[matrix.path], dtype)]
    described += [(f"{norm.path}.weight", dtype, (norm.size,)) for norm in own_norms]
    # Sizes that are whole pages first: every tensor of a real model then starts on a page, with no padding in between.
    described.sort(key=lambda entry: -_alignment(prod(entry[2]) * ITEM_BYTES[entry[1]]))
    return lay_out(file, layer, own, own_norms, described, "mlx", ALIGNMENT_BYTES)


def lay_out(
    file: str,
    layer: int | None,
    own: tuple[Matrix, ...],
    own_norms: tuple[Norm, ...],
    described: Iterable[Described],
    written_for: str,
    alignment: int,
) -> ShardPlan:
    """A shard of the tensors ``described`` by name, dtype and shape, in this order; its data starts at a multiple of
    ``alignment``.
    """
    header: dict[str, object] = {"__metadata__": {"format": written_for}}
    end = 0
    placed = []
    for name, kind, shape in described:
        start, end = end, end + prod(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        placed.append(TensorPlan(name, kind, shape, start, end - start))
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % alignment)
    first = 8 + len(raw)
    tensors = {tensor.name: dataclasses.replace(tensor, offset=first + tensor.offset) for tensor in placed}
    return ShardPlan(file, layer, struct.pack("<Q", len(raw)) + raw, tensors, own, own_norms)


def _tensors(matrix: Matrix, spec: QuantizationSpec | None, dtype: str) -> Iterator[Described]:
    # A dense model's only expert is an ordinary matrix on disk.
    lead = matrix.shape[:-1] if not matrix.path.rpartition(".")[0].endswith(".mlp") else (matrix.out_features,)
    for field in fields_of(spec):
        name = module_tensor(matrix, field)
        if spec is None:
            yield name, dtype, (*lead, matrix.in_features)
        elif field == "weight":
            yield name, "U32", (*lead, spec.packed_columns(matrix.in_features))
        else:
            yield name, dtype if spec.has_biases else "U8", (*lead, spec.groups(matrix.in_features))


def _alignment(nbytes: int) -> int:
    """The largest power of two that divides a size, up to a page."""
    return min(nbytes & -nbytes, ALIGNMENT_BYTES) if nbytes else ALIGNMENT_BYTES
