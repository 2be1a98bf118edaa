"""A folder of safetensors files as one collection of tensors: the index decides, and names never leave the folder."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.folder import must_convert, refuse_foreign
from mlx_mixtral.config.layout import Rows
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import MAX_INDEX_BYTES, is_there, names_like, open_descriptor, read_json
from mlx_mixtral.weights.files import choose_files
from mlx_mixtral.weights.names import unwrapped
from mlx_mixtral.weights.safetensors import TensorInfo, read_header, read_into

__all__ = ["Checkpoint", "CheckpointReader", "close_files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint(Mapping[str, TensorInfo]):
    """Tensors of a checkpoint folder by name. Opening reads headers only.

    The index, where there is one, says which file holds a tensor; a file it does not name is ignored. Without an index it is
    ``model.safetensors``, else the headers of all files of the model (``choose_files``). Names are the model's own, without
    what a trainer put around it.

    Raises:
        CheckpointError: no weights, or weights that have to be converted first; an index that names an absent file or one
            outside the folder, a tensor the index places in a file that does not have it, one that two files have where there
            is no index, or a damaged header.
    """

    index_name, single_name = INDEX, SINGLE
    unnamed: Mapping[str, TensorInfo] = {}
    """Tensors of the files that the index names, which it does not name themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = self._open(folder)

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The weight files, each once, in order of name."""
        return sorted({info.file for info in self._tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def rows_of(self, rows: Rows) -> TensorInfo:
        """The tensor ``rows`` points into, after checking that it has the number of rows the layout promises.

        Raises:
            CheckpointError: the tensor is missing or has another shape.
        """
        info = self[rows.name]
        leading = () if rows.experts is None else (rows.experts,)
        wanted = (*leading, rows.of // (rows.experts or 1))
        if info.shape[:-1] != wanted:
            expected = ", ".join(map(str, (*wanted, "…")))
            raise CheckpointError(
                f"{info.file}: tensor {rows.name!r} has shape {list(info.shape)}; the configuration calls for [{expected}]"
            )
        return info

    def _has(self, file: str) -> bool:
        return is_there(self.folder / file)

    def _header(self, file: str) -> Mapping[str, TensorInfo]:
        return read_header(self.folder / file)

    def _all_names(self) -> list[str]:
        """Everything in the folder."""
        return [file.name for file in names_like(self.folder, "*")]

    def _open(self, folder: Path) -> dict[str, TensorInfo]:
        index = folder / self.index_name
        tensors = unwrapped(self._read_index(index) if is_there(index) else self._read_files())
        if "tok_embeddings.weight" in tensors:
            raise must_convert(
                self.folder, "tensors under Mistral's own names", tensors["tok_embeddings.weight"].file.name
            )
        return tensors

    def _read_files(self) -> dict[str, TensorInfo]:
        """The union of all files, where no index says which counts."""
        names, suffix = self._all_names(), Path(self.single_name).suffix
        if self._has(self.single_name):
            chosen = [self.single_name]
        else:
            chosen = choose_files([name for name in names if name.endswith(suffix)], self.folder)
        if not chosen:
            refuse_foreign(names, self.folder)
            raise CheckpointError(f"{self.folder} has no weights: neither {self.index_name} nor {self.single_name}")
        tensors: dict[str, TensorInfo] = {}
        for file in chosen:
            for name, info in self._header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{info.file}: tensor {name!r} is in {tensors[name].file.name} too, and there is no {self.index_name} "
                        "to say which one to use; remove the file that does not belong to the model"
                    )
                tensors[name] = info
        return tensors

    def _read_index(self, index: Path) -> dict[str, TensorInfo]:
        weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing")
        headers: dict[str, Mapping[str, TensorInfo]] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", ".", "..") or any(char in file for char in "/\\\0"):
                raise CheckpointError(
                    f"{index}: tensor {name!r} is placed in {file!r}, which is not a file of this folder"
                )
            if file not in headers:
                if not self._has(file):
                    raise CheckpointError(f"{index} names {file!r}, which is not in {self.folder}; download it again")
                headers[file] = self._header(file)
            if name not in headers[file]:
                raise CheckpointError(f"{index} places tensor {name!r} in {file!r}, which does not have it")
            tensors[name] = headers[file][name]
        self.unnamed = {
            name: info for header in headers.values() for name, info in header.items() if name not in tensors
        }
        return tensors


def close_files(descriptors: dict[Path, int]) -> None:
    """Close them all; none is left in ``descriptors``."""
    while descriptors:
        os.close(descriptors.popitem()[1])


class CheckpointReader:
    """Open files of a checkpoint; reads are positioned, so any number of threads may share one reader."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, close_files, self._descriptors)
        try:
            for file in checkpoint.files:
                self._descriptors[file] = open_descriptor(file)
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        close_files(self._descriptors)

    def read(self, info: TensorInfo, buffer: memoryview, skip_bytes: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``skip_bytes`` on."""
        what = f"{info.file}: tensor {info.name!r}"
        read_into(self._descriptors[info.file], buffer, info.offset + skip_bytes, what)

    def rows(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes of rows ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]``, in fresh memory."""
        raw = np.empty((stop - start, info.row_bytes), np.uint8)
        self.read(info, raw.reshape(-1).data, start * info.row_bytes)
        return raw
