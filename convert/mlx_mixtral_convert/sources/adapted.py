"""A source with adapters fused in: what it reads are the changed weights, in float32.

Adapters are applied one after the other, each to what those before it left. Of a matrix, ``W [out, in]``:

    low rank        W + b a
    DoRA            m / |W + b a| * (W + b a), norms by rows                         arXiv 2402.09353
    replaced        what the adapter has in its place
    token rows      the adapter's rows in place of those of a few tokens

Rows come as the model has them, whatever order a file holds them in, so that one rule serves every layout. The changes of one
expert of one matrix are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.adapters.adapter import Adapter, Floats, LowRank
from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.config.layout import Field, Matrix, Norm, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConversionError
from mlx_mixtral.hub import BytesDone
from mlx_mixtral.reading import names_like
from mlx_mixtral.weights.dtypes import convert
from mlx_mixtral_convert.packing.measure import row_blocks
from mlx_mixtral_convert.packing.values import NativePacking, Values
from mlx_mixtral_convert.sources.base import PackedSource, SourceFiles, TensorSource, small_files
from mlx_mixtral_convert.sources.storage.local import LocalStorage

__all__ = ["AdaptedSource", "adapt", "fuse", "open_adapted", "touched_by"]

# Of one product of factors, 16 MB: in the small blocks of other passes BLAS's threads would mostly wait for each other.
PRODUCT_VALUES = 2**22


def fuse(weights: Floats, change: LowRank) -> None:
    """Apply a low-rank change to ``weights [out, in]`` in place, blocks of rows at a time.

    A row that is all zero after the change stays so, whatever its magnitude.
    """
    step = max(1, PRODUCT_VALUES // weights.shape[1])
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        block = weights[rows]
        block += change.b[rows] @ change.a
        if change.magnitude is not None:
            lengths = np.sqrt(np.einsum("oi,oi->o", block, block))
            factors = np.zeros_like(lengths)
            np.divide(change.magnitude[rows], lengths, out=factors, where=lengths > 0)
            block *= factors[:, None]


def open_adapted(
    source: TensorSource, adapters: Sequence[AdapterSource], progress: BytesDone | None = None
) -> AdaptedSource:
    """``source`` with adapters fused in, in this order; a packed source stays one. They are closed with it.

    Every change is read once, so that what cannot be fused is known before anything is written.

    Args:
        progress: told (done bytes, total bytes) while an adapter is downloaded.

    Raises:
        CheckpointError: no adapter, one of another model, or one that is damaged or holds NaN or infinity.
        ConversionError: an adapter that adds a bias to outputs.
        HubError: a repository cannot be used.
        InvalidRequestError: a scale for an adapter that has no use for one.
    """
    with ExitStack() as opened:
        found = []
        for given in adapters:
            adapter = open_adapter(
                given.path, source.config, scale=given.scale, revision=given.revision, progress=progress
            )
            opened.callback(adapter.close)
            _check_fusable(adapter, source.config)
            found.append(adapter)
        opened.pop_all()
    return adapt(source, found)


def adapt(source: TensorSource, adapters: Sequence[Adapter]) -> AdaptedSource:
    """The same of adapters that are open."""
    kind = _AdaptedPackedSource if isinstance(source, PackedSource) else AdaptedSource
    return kind(source, adapters)


class AdaptedSource:
    """Any source, with adapters fused in. What they touch is float32, everything else is read as it was."""

    def __init__(self, base: TensorSource, adapters: Sequence[Adapter]) -> None:
        self.base, self.adapters = base, tuple(adapters)
        self.touched = frozenset().union(*(touched_by(adapter) for adapter in adapters))
        self.files: SourceFiles = _WatchedFiles(base.files, adapters)

    @property
    def config(self) -> MixtralConfig:
        return self.base.config

    @property
    def entries(self) -> Mapping[str, Any]:
        return self.base.entries

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def notes(self) -> tuple[str, ...]:
        own = (f"adapter {adapter.name}: {note}" for adapter in self.adapters for note in adapter.notes)
        return (*self.base.notes, *own)

    def dtype(self, matrix: Matrix) -> str:
        return "F32" if matrix.path in self.touched else self.base.dtype(matrix)

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        return self.base.name(item, expert)

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        return self.base.file(item, expert)

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        if matrix.path not in self.touched:
            return self.base.read(matrix, expert, scratch)
        count = matrix.out_features * matrix.in_features
        weights = scratch[: 4 * count].view(np.float32).reshape(matrix.out_features, matrix.in_features)
        # What came before a replacement does not matter.
        last = max((i for i, adapter in enumerate(self.adapters) if matrix.path in adapter.replaced), default=-1)
        if last < 0:
            self._read_base(matrix, expert, scratch, weights)
        for adapter in self.adapters[max(last, 0) :]:
            _apply(adapter, matrix, expert, weights)
        return Values(weights, "F32")

    def read_norm(self, norm: Norm) -> Values:
        for adapter in reversed(self.adapters):
            if norm.path in adapter.replaced:
                return Values(adapter.replacement(norm.path).reshape(1, norm.size), "F32")
        return self.base.read_norm(norm)

    @property
    def largest_changes_bytes(self) -> int:
        """Memory that the changes of one matrix take at most, with the factors of all its experts where a file mixes them."""
        listed = list(matrices(self.config))
        return sum(max((_changes_bytes(adapter, matrix) for matrix in listed), default=0) for adapter in self.adapters)

    def small_files(self) -> dict[str, bytes]:
        """Those of the source."""
        return small_files(self.base)

    def close(self) -> None:
        with ExitStack() as closing:
            closing.callback(self.base.close)
            for adapter in self.adapters:
                closing.callback(adapter.close)

    def __enter__(self) -> AdaptedSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_base(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8], into: Floats) -> None:
        own = self.base.dtype(matrix)
        # Narrow values are read into the end of the memory and widened from its start, which never overtakes them.
        skip = 0 if own == "F32" else into.nbytes // 2
        values = self.base.read(matrix, expert, scratch[skip : into.nbytes])
        for rows in row_blocks(*into.shape):
            into[rows] = convert(values.array[rows], values.dtype, "F32")


class _AdaptedPackedSource(AdaptedSource):
    """A source that is packed already, with adapters fused in: what they touch has to be packed anew."""

    base: PackedSource

    def native(self, matrix: Matrix) -> NativePacking | None:
        packing = self.base.native(matrix)
        if packing is None or matrix.path not in self.touched:
            return packing
        return replace(packing, exact=False, lossless=False)

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        return self.base.read_packed(matrix, expert)


class _WatchedFiles(SourceFiles):
    """The weight files of a source, while those of adapters are watched with them."""

    def __init__(self, base: SourceFiles, adapters: Sequence[Adapter]) -> None:
        self._base, self.paths = base, base.paths
        self._adapters = [
            SourceFiles(LocalStorage(a.folder), names_like(a.folder, "adapter*.safetensors", "adapter_config.json"))
            for a in adapters
        ]

    @property
    def nbytes(self) -> int:
        return self._base.nbytes

    def describe(self) -> dict[str, dict[str, Any]]:
        return self._base.describe()

    def stop_waiting(self) -> None:
        self._base.stop_waiting()

    def check_unchanged(self) -> None:
        for files in (self._base, *self._adapters):
            files.check_unchanged()


def touched_by(adapter: Adapter) -> frozenset[str]:
    """Paths of the matrices and norms that an adapter changes."""
    return frozenset(adapter.ranks) | adapter.replaced | adapter.token_rows


def _apply(adapter: Adapter, matrix: Matrix, expert: int, weights: Floats) -> None:
    if matrix.path in adapter.replaced:
        weights[:] = adapter.replacement(matrix.path)
    if matrix.path in adapter.ranks and (change := _low_rank(adapter, matrix, expert)) is not None:
        fuse(weights, change)
    if matrix.path in adapter.token_rows:
        trained = adapter.rows(matrix.path)
        weights[list(trained.tokens)] = trained.rows


def _changes_bytes(adapter: Adapter, matrix: Matrix) -> int:
    whole = matrix.out_features * matrix.in_features if matrix.path in adapter.replaced | adapter.token_rows else 0
    factors = adapter.ranks.get(matrix.path, 0) * (matrix.out_features + matrix.in_features) * (matrix.num_experts or 1)
    return 4 * (whole + factors)


def _low_rank(adapter: Adapter, matrix: Matrix, expert: int) -> LowRank | None:
    return adapter.low_rank(matrix.path, None if matrix.num_experts is None else expert)


def _check_fusable(adapter: Adapter, config: MixtralConfig) -> None:
    for matrix in matrices(config):
        if matrix.path in adapter.replaced:
            adapter.replacement(matrix.path)
        if matrix.path in adapter.token_rows:
            adapter.rows(matrix.path)
        for expert in range(matrix.num_experts or 1) if matrix.path in adapter.ranks else ():
            change = _low_rank(adapter, matrix, expert)
            if change is not None and change.bias is not None:
                raise ConversionError(
                    f"adapter {adapter.name} adds a bias to the output of {matrix.path}, which the model has no tensor for; "
                    "use the adapter at run time instead of fusing it"
                )
    for norm in norms(config):
        if norm.path in adapter.replaced:
            adapter.replacement(norm.path)
