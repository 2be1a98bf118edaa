"""What every input layout gives the converter: shapes first, then one matrix at a time.

A source is opened on a folder, checks every tensor the model needs against the configuration, and only then hands out
values. A new layout is one module with one class of this shape, and a line in ``sources/__init__.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, Norm, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConversionError
from mlx_mixtral.reading import companion_bytes, names_like, read_file
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.packing.values import NativePacking, Values
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = [
    "GeneratedFiles", "PackedSource", "SourceFiles", "TensorSource", "main_dtype", "matrix_bytes", "read_companions",
    "small_files", "tensor_place",
]  # fmt: skip


class TensorSource(Protocol):
    """One checkpoint of any layout, as the matrices and norms of ``mlx_mixtral.config.layout``.

    Opening a source reads headers only and raises CheckpointError for a tensor that is missing, of another shape, or not of a
    float type. ``read`` and ``read_norm`` may be called from one other thread than the one that opened it.
    """

    @property
    def config(self) -> MixtralConfig: ...

    @property
    def entries(self) -> Mapping[str, Any]:
        """The Hugging Face ``config.json`` entries to pass on."""
        ...

    @property
    def folder(self) -> Path:
        """Where the tokenizer and the other small files lie."""
        ...

    @property
    def files(self) -> SourceFiles:
        """The weight files."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what is left out of it."""
        ...

    def dtype(self, matrix: Matrix) -> str:
        """Safetensors float type of a matrix: F32, F16 or BF16."""
        ...

    def name(self, item: Matrix | Norm, expert: int = 0) -> str:
        """What this layout calls one expert of a matrix (expert 0 of what has none), for messages."""
        ...

    def file(self, item: Matrix | Norm, expert: int = 0) -> Path:
        """The file it is read from."""
        ...

    def read(self, matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values:
        """One expert of a matrix, ``[out_features, in_features]``.

        ``scratch`` is memory the result may lie in: at least as many bytes as the matrix has in its ``dtype``. It is used
        again three reads later.
        """
        ...

    def read_norm(self, norm: Norm) -> Values:
        """A norm's weight, ``[1, size]``."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *error: object) -> None: ...


def tensor_place(source: TensorSource, item: Matrix | Norm, expert: int = 0) -> str:
    """How a message about the values of a tensor begins: with its file and its name there."""
    return f"{source.file(item, expert)}: tensor {source.name(item, expert)!r}"


@runtime_checkable
class PackedSource(TensorSource, Protocol):
    """A source whose weights are packed already, and that can hand its integers over as MLX stores them.

    ``read`` still gives the dequantised values: what an ``exact`` conversion measures against, and a plain one packs again.
    """

    def native(self, matrix: Matrix) -> NativePacking | None:
        """How a matrix is packed here, None for one of floats.

        Raises:
            ConversionError: its experts are packed in different ways.
        """
        ...

    def read_packed(self, matrix: Matrix, expert: int) -> dict[Field, npt.NDArray[Any]]:
        """One expert of a matrix whose ``native`` is exact: ``weight`` uint32 ``[out_features, words]``, ``scales`` and
        ``biases`` float16 ``[out_features, groups]``, in new arrays. In modes other than affine scales are bytes, and there
        are no biases.

        Raises:
            ConversionError: a scale or bias that float16 cannot hold.
        """
        ...


@runtime_checkable
class GeneratedFiles(Protocol):
    """A source that holds its tokenizer inside, or knows which small files belong to it."""

    def small_files(self) -> dict[str, bytes]:
        """Tokenizer files and the like by name, in place of those that would be copied from the source's folder."""
        ...


_COPIED = (
    "tokenizer.model*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "generation_config.json", "LICENSE*",
)  # fmt: skip


def small_files(source: TensorSource) -> dict[str, bytes]:
    """Tokenizer, generation settings and licence by file name. Links count as the files they lead to.

    Raises:
        CheckpointError: one cannot be read.
    """
    if isinstance(source, GeneratedFiles):
        return source.small_files()
    return read_companions(source.folder, *_COPIED)


def read_companions(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Files of a folder that match, by name.

    Raises:
        CheckpointError: one cannot be read, or has more bytes than any of its kind.
    """
    # A folder of licences is none.
    return {
        path.name: read_file(path, companion_bytes(path.name))
        for path in names_like(folder, *patterns)
        if path.name != "LICENSES"
    }


def matrix_bytes(source: TensorSource, matrix: Matrix) -> int:
    """Bytes of a matrix, of one expert where it has experts, as it is read."""
    return matrix.out_features * matrix.in_features * ITEM_BYTES[source.dtype(matrix)]


def main_dtype(source: TensorSource) -> str:
    """The float type that most weights are read in."""
    weights: Counter[str] = Counter()
    for matrix in matrices(source.config):
        weights[source.dtype(matrix)] += matrix.parameters
    return weights.most_common(1)[0][0]


class SourceFiles:
    """The weight files of a source and what they looked like when it was opened."""

    def __init__(self, storage: Storage, paths: list[Path]) -> None:
        self.paths = tuple(paths)
        self._storage = storage
        self._seen = {path: self._look(path) for path in self.paths}

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self._seen.values())

    def describe(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 or fingerprint of each file by its name."""
        return {path.name: self._storage.describe(path) for path in self.paths}

    def stop_waiting(self) -> None:
        """The conversion is over: reads that wait for something, such as a network, end soon with an error."""
        self._storage.stop()

    def check_unchanged(self) -> None:
        """Raise ConversionError if a file was written to since the source was opened."""
        for path, (size, modified_ns) in self._seen.items():
            now = self._look(path)
            if now != (size, modified_ns):
                what = f"its size went from {size} to {now[0]} bytes" if now[0] != size else "it was modified"
                raise ConversionError(f"{path} changed during the conversion ({what}); wait until it is complete")

    def _look(self, path: Path) -> tuple[int, int]:
        try:
            return self._storage.look(path)
        except OSError as error:
            raise ConversionError(f"{path} can no longer be read: {error.strerror or error}") from error
