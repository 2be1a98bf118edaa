"""What one machine holds of a checkpoint: which matrices and norms, cut to which shape, and where their bytes lie.

The whole checkpoint is checked whatever the share is: a tensor that is missing on one machine's part is missing on all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from mlx_mixtral.config.layout import Field, Matrix, Norm, Rows, fields_of, locate, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.distributed.shares import MIN_GROUP, Share
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.packing import packing_of
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo
from mlx_mixtral.weights.unused import refuse_unused, unused_tensors

__all__ = ["HeldRows", "HeldWeights", "expert_group_size"]


@dataclass(frozen=True)
class HeldRows:
    """Rows ``start`` to ``stop`` of a tensor, and of these the numbers ``columns``; all of them when None."""

    info: TensorInfo
    start: int
    stop: int
    columns: range | None


class HeldWeights:
    """The matrices and norms of ``share``, all there are when None, by the checkpoint's paths.

    ``checkpoint_matrices`` and ``checkpoint_norms`` are the whole model's, ``matrices`` and ``norms`` those held, as large as
    they are held; ``specs`` tells the packing of every matrix, None for floats.

    Raises:
        CheckpointError, ConfigError: as ``Builder``.
    """

    def __init__(self, config: MixtralConfig, checkpoint: Checkpoint, dtype: str, share: Share | None = None) -> None:
        self.checkpoint, self.dtype, self.share = checkpoint, dtype, share
        self.config = config if share is None else share.part_of(config)
        self.layers = range(config.num_hidden_layers) if share is None else share.layers
        self.checkpoint_matrices = {matrix.path: matrix for matrix in matrices(config)}
        self.checkpoint_norms = {norm.path: norm for norm in norms(config)}
        self.specs = {
            path: packing_of(matrix, config.quantization, checkpoint)
            for path, matrix in self.checkpoint_matrices.items()
        }
        self._check(config)
        self.matrices = {
            path: self._cut(matrix)
            for path, matrix in self.checkpoint_matrices.items()
            if share is None or share.holds(matrix.layer, is_head=matrix.part == "head")
        }
        self.norms = {
            path: norm for path, norm in self.checkpoint_norms.items() if share is None or share.holds(norm.layer)
        }

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the compute type."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory, scales in the compute type."""
        norms_bytes = sum(norm.size * self.item_bytes for norm in self.norms.values())
        return norms_bytes + sum(self.matrix_bytes(matrix) for matrix in self.matrices.values())

    def matrix_bytes(self, matrix: Matrix) -> int:
        """Bytes of a matrix in memory."""
        spec, rows = self.specs[matrix.path], matrix.parameters // matrix.in_features
        if spec is None:
            return matrix.parameters * self.item_bytes
        return spec.nbytes(rows, matrix.in_features, self.item_bytes)

    def expert_matrices(self, layer: int) -> list[Matrix]:
        """Gate, up and down of a layer, as the checkpoint counts layers."""
        return [matrix for matrix in self.matrices.values() if matrix.part == "expert" and matrix.layer == layer]

    def fields(self, path: str) -> tuple[Field, ...]:
        """The arrays a matrix consists of."""
        return fields_of(self.specs[path])

    def columns(self, matrix: Matrix, field: Field) -> int:
        """Numbers in a row of a field: words, groups, or inputs where it is not packed."""
        return self._stored(matrix, field, matrix.in_features)

    def memory_dtype(self, path: str, field: Field) -> str:
        """The type a field is held in, by its safetensors name."""
        spec = self.specs[path]
        if spec is None or (field != "weight" and spec.mode == "affine"):
            return self.dtype
        return "U32" if field == "weight" else "U8"

    def places(self, path: str, field: Field) -> list[HeldRows]:
        """Where a field of a held matrix lies, one entry for each expert."""
        whole, cut = self.checkpoint_matrices[path], self.columns_cut(path)
        rows = None if whole.path.endswith(_DOWN) or cut is None else cut
        columns = None
        if cut is not None and rows is None:
            columns = range(self._stored(whole, field, cut.start), self._stored(whole, field, cut.stop))
        found = []
        for at in self._locations(whole, field):
            start, stop = (at.start, at.stop) if rows is None else (at.start + rows.start, at.start + rows.stop)
            found.append(HeldRows(self.checkpoint[at.name], start, stop, columns))
        return found

    @cached_property
    def _group_size(self) -> int:
        return _group_size(self.checkpoint_matrices, self.specs)

    def columns_cut(self, path: str) -> range | None:
        """The slice of the experts' width that is held, for a matrix of experts that are cut."""
        columns = None if self.share is None else self.share.columns
        whole = self.checkpoint_matrices[path]
        if whole.part != "expert" or columns is None:
            return None
        width = whole.in_features if path.endswith(_DOWN) else whole.out_features
        if columns == range(width):
            return None
        ends = (columns.start, columns.stop)
        assert all(end == width or end % self._group_size == 0 for end in ends), "a share parts a quantisation group"
        return columns

    def _cut(self, matrix: Matrix) -> Matrix:
        columns = self.columns_cut(matrix.path)
        if columns is None:
            return matrix
        if matrix.path.endswith(_DOWN):
            return replace(matrix, in_features=len(columns))
        return replace(matrix, out_features=len(columns))

    def _stored(self, matrix: Matrix, field: Field, inputs: int) -> int:
        """Numbers that ``inputs`` weights of a row are stored as."""
        spec = self.specs[matrix.path]
        if spec is None:
            return inputs
        return spec.packed_columns(inputs) if field == "weight" else spec.groups(inputs)

    def _check(self, config: MixtralConfig) -> None:
        for norm in self.checkpoint_norms.values():
            self._check_norm(norm)
        used = {f"{path}.weight" for path in self.checkpoint_norms}
        for path, matrix in self.checkpoint_matrices.items():
            for field in self.fields(path):
                used.update(rows.name for rows in self._locations(matrix, field))
        if unused := unused_tensors(self.checkpoint, used, config):
            with CheckpointReader(self.checkpoint) as reader:
                refuse_unused(unused, reader)

    def _locations(self, matrix: Matrix, field: Field) -> list[Rows]:
        """Where a field of a matrix of the checkpoint lies, one entry for each expert, after checking shapes and types."""
        found = locate(matrix, field, self.checkpoint)
        if found is None:
            raise CheckpointError(f"{self.checkpoint.folder}: tensor {matrix.path}.{field} is missing in every layout")
        columns, wanted = self.columns(matrix, field), self.memory_dtype(matrix.path, field)
        for rows in found:
            info = self.checkpoint.rows_of(rows)
            if info.shape[-1] != columns:
                raise CheckpointError(
                    f"{info.file}: tensor {rows.name!r} has shape {list(info.shape)}; its last axis should be {columns}"
                )
            integer = wanted in ("U32", "U8")
            if (info.dtype != wanted) if integer else (info.dtype not in ("F32", "F16", "BF16")):
                kind = wanted if integer else "F32, F16 or BF16"
                raise CheckpointError(f"{info.file}: tensor {rows.name!r} has dtype {info.dtype}; {kind} was expected")
        return found

    def _check_norm(self, norm: Norm) -> None:
        info = self.checkpoint[f"{norm.path}.weight"]
        if info.shape != (norm.size,):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; [{norm.size}] was expected"
            )
        if info.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; a float type was expected"
            )


def expert_group_size(config: MixtralConfig, checkpoint: Checkpoint) -> int:
    """Columns of the experts' width that ``expert_shares`` has to keep together: the largest group of their packings.

    Raises:
        CheckpointError, ConfigError: the quantisation entry contradicts the tensors.
    """
    found = {matrix.path: matrix for matrix in matrices(config) if matrix.part == "expert"}
    return _group_size(
        found, {path: packing_of(matrix, config.quantization, checkpoint) for path, matrix in found.items()}
    )


def _group_size(found: dict[str, Matrix], specs: dict[str, QuantizationSpec | None]) -> int:
    packed = (specs[path] for path, matrix in found.items() if matrix.part == "expert")
    return lcm(MIN_GROUP, *(spec.group_size for spec in packed if spec is not None))


_DOWN = ".down_proj"
