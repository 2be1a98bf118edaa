"""PyTorch's ``.bin``, ``.pt`` and ``.pth`` files without PyTorch: names and shapes first, storages by byte range.

Such a file is a zip of stored entries: ``NAME/data.pkl``, a pickle that describes the tensors, and ``NAME/data/K``, the raw
storages they lie in (https://docs.pytorch.org/docs/stable/notes/serialization.html). Before torch 1.6 it is pickles in a row
and the storages after them: see ``legacy``. Nothing of a pickle is run: see ``pickle``.
"""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import POINTER_FIX, is_pointer
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.sources.storage.archive import ZIP_ERRORS, data_starts, entries_of, open_archive, plain_entry
from mlx_mixtral_convert.sources.storage.file import StoredTensor, head_of
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.legacy import is_legacy, read_legacy
from mlx_mixtral_convert.sources.torch.pickle import PickleError, TensorDescription, describe

__all__ = ["read_torch"]

# The largest real one, of a thousand tensors, has under a megabyte.
MAX_PICKLE_BYTES = 4 * 2**20


def read_torch(path: Path, storage: Storage) -> dict[str, StoredTensor]:
    """Names, shapes, dtypes and byte ranges of every tensor in ``path``, a file of ``storage``.

    No tensor is read.

    Raises:
        CheckpointError: neither a zip nor pickles, truncated, compressed, a pickle that names anything but tensors, a tensor
            beyond its storage, or one with strides that are neither plain nor transposed.
    """
    head = head_of(storage, path)
    if is_pointer(head):
        raise CheckpointError(f"{path} {POINTER_FIX}")
    try:
        described, starts, sizes = read_legacy(path, storage) if is_legacy(head) else _read_zip(path, storage)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return {
        name: _place(path, name, tensor, starts[tensor.storage.key], sizes[tensor.storage.key])
        for name, tensor in described.items()
    }


def _read_zip(path: Path, storage: Storage) -> tuple[dict[str, TensorDescription], dict[str, int], dict[str, int]]:
    """The tensors, and where each storage begins and how many bytes it has."""
    try:
        with storage.open(path) as file, open_archive(file) as archive:
            entries = entries_of(path, archive)
            root = _root(path, entries)
            _check_order(path, archive, entries.get(f"{root}/byteorder"))
            description = plain_entry(path, entries[f"{root}/data.pkl"], MAX_PICKLE_BYTES)
            data = archive.read(description)
    except ZIP_ERRORS as error:
        raise CheckpointError(
            f"{path} is not a readable torch file: {error}; it is truncated, or not a torch file"
        ) from error
    described = describe(data)
    used: dict[str, zipfile.ZipInfo] = {}
    for name, tensor in described.items():
        key = f"{root}/data/{tensor.storage.key}"
        if key not in entries:
            raise CheckpointError(f"{path}: tensor {name!r} is in storage {key!r}, which is not in the file")
        used[tensor.storage.key] = plain_entry(path, entries[key])
    starts = dict(zip(used, data_starts(path, storage, used.values()), strict=True))
    return described, starts, {key: entry.file_size for key, entry in used.items()}


def _root(path: Path, entries: dict[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise CheckpointError(
            f"{path} is a zip file without tensors: it has {len(roots)} entries called data.pkl, not one"
        )
    return roots[0]


def _check_order(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None) -> None:
    if entry is not None and archive.read(plain_entry(path, entry, 64)).strip() != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on a little-endian one")


def _place(path: Path, name: str, tensor: TensorDescription, start: int, nbytes: int) -> StoredTensor:
    shape, strides, item = tensor.shape, tensor.strides, ITEM_BYTES[tensor.storage.dtype]
    plain = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    flat = all(size == 1 or a == b for size, a, b in zip(shape, strides, plain, strict=True))
    if not flat and not (len(shape) == 2 and strides == (1, shape[0])):
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} has strides {list(strides)}; save a contiguous copy"
        )
    end = tensor.offset + prod(shape)
    if end > tensor.storage.numel or tensor.storage.numel * item > nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} needs {end} values of its storage, which has {min(tensor.storage.numel, nbytes // item)}"
        )
    return StoredTensor(
        name, path, tensor.storage.dtype, shape, start + tensor.offset * item, prod(shape) * item, transposed=not flat
    )
