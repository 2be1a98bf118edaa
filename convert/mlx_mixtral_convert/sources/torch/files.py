"""PyTorch's ``.bin``, ``.pt`` and ``.pth`` files without PyTorch: names and shapes first, storages by byte range.

Such a file is a zip of stored entries: ``NAME/data.pkl``, a pickle that describes the tensors, and ``NAME/data/K``, the raw
storages they lie in (https://docs.pytorch.org/docs/stable/notes/serialization.html). Nothing of the
pickle is run; see ``pickle``.
"""

from __future__ import annotations

import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, cast

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.pickle import PickleError, TensorDescription, describe

__all__ = ["StoredTensor", "read_torch"]

# The largest real one, of a thousand tensors, has under a megabyte.
MAX_PICKLE_BYTES = 4 * 2**20
MAX_DIRECTORY_BYTES = 16 * 2**20
_LOCAL_HEADER_BYTES = 30
# Where a storage begins stands before each: a thousand requests to a hub, one after another, would take minutes.
THREADS = 8


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor whose bytes hold each matrix of ``shape`` as it is or, when ``transposed``, column by column."""

    transposed: bool = False


def read_torch(path: Path, storage: Storage) -> dict[str, StoredTensor]:
    """Names, shapes, dtypes and byte ranges of every tensor in ``path``, a file of ``storage``.

    No tensor is read.

    Raises:
        CheckpointError: not a zip, truncated, compressed, a pickle that names anything but tensors, a tensor beyond its
            storage, or one with strides that are neither plain nor transposed.
    """
    try:
        with storage.open(path) as file, zipfile.ZipFile(cast("BinaryIO", _Bounded(file))) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise CheckpointError(f"{path}: two entries have one name; the file is damaged")
            root = _root(path, entries)
            _check_order(path, archive, entries.get(f"{root}/byteorder"))
            description = _stored(path, entries[f"{root}/data.pkl"], MAX_PICKLE_BYTES)
            data = archive.read(description)
    except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a torch file that can be read: {error}; it is truncated, or from before torch 1.6"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        described = describe(data)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    used: dict[str, zipfile.ZipInfo] = {}
    for name, tensor in described.items():
        key = f"{root}/data/{tensor.storage.key}"
        if key not in entries:
            raise CheckpointError(f"{path}: tensor {name!r} lies in storage {key!r}, which is not in the file")
        used[tensor.storage.key] = _stored(path, entries[key])
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
        starts = dict(zip(used, pool.map(lambda entry: _data_start(path, storage, entry), used.values()), strict=True))
    _refuse_overlaps(path, [(starts[key], entry) for key, entry in used.items()])
    return {
        name: _place(path, name, tensor, starts[tensor.storage.key], used[tensor.storage.key].file_size)
        for name, tensor in described.items()
    }


class _Bounded:
    """A file of which no more is read at once than a directory of a real one has: its size is what the file says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(MAX_DIRECTORY_BYTES + 1 if count < 0 else min(count, MAX_DIRECTORY_BYTES + 1))
        if len(data) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has more than {MAX_DIRECTORY_BYTES} bytes")
        return data


def _refuse_overlaps(path: Path, placed: list[tuple[int, zipfile.ZipInfo]]) -> None:
    """Tensors may share a storage, as tied ones do; storages that share bytes are a directory that is wrong."""
    end, last = 0, ""
    for start, entry in sorted(placed, key=lambda pair: (pair[0], pair[1].file_size)):
        if start < end:
            raise CheckpointError(f"{path}: entries {last!r} and {entry.filename!r} share bytes; the file is damaged")
        end, last = start + entry.file_size, entry.filename


def _root(path: Path, entries: dict[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise CheckpointError(
            f"{path} is a zip file without tensors: it has {len(roots)} entries called data.pkl, not one"
        )
    return roots[0]


def _check_order(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None) -> None:
    if entry is not None and archive.read(_stored(path, entry, 64)).strip() != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on another")


def _stored(path: Path, entry: zipfile.ZipInfo, limit: int | None = None) -> zipfile.ZipInfo:
    """The entry, if its bytes lie in the file as they are and number ``limit`` at most."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise CheckpointError(
            f"{path}: entry {entry.filename!r} is compressed or encrypted; torch stores entries plain"
        )
    if limit is not None and entry.file_size > limit:
        raise CheckpointError(f"{path}: entry {entry.filename!r} has {entry.file_size} bytes; at most {limit} are read")
    return entry


def _data_start(path: Path, storage: Storage, entry: zipfile.ZipInfo) -> int:
    head, size = bytearray(_LOCAL_HEADER_BYTES), storage.look(path)[0]
    if 0 <= entry.header_offset <= size - len(head):
        storage.read_into(path, memoryview(head), entry.header_offset)
    if head[:4] != b"PK\3\4":
        raise CheckpointError(f"{path}: entry {entry.filename!r} is not where the directory says; the file is damaged")
    name_bytes, extra_bytes = struct.unpack_from("<HH", head, 26)
    start: int = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if start + entry.file_size > size:
        raise CheckpointError(f"{path}: entry {entry.filename!r} ends beyond the file's {size} bytes; it is truncated")
    return start


def _place(path: Path, name: str, tensor: TensorDescription, start: int, nbytes: int) -> StoredTensor:
    shape, strides, item = tensor.shape, tensor.strides, ITEM_BYTES[tensor.storage.dtype]
    plain = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    flat = all(size == 1 or a == b for size, a, b in zip(shape, strides, plain, strict=True))
    if not flat and not (len(shape) == 2 and strides == (1, shape[0])):
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} has strides {list(strides)}; save a plain copy"
        )
    end = tensor.offset + prod(shape)
    if end > tensor.storage.numel or tensor.storage.numel * item > nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} needs {end} values of its storage, which has {min(tensor.storage.numel, nbytes // item)}"
        )
    return StoredTensor(
        name, path, tensor.storage.dtype, shape, start + tensor.offset * item, prod(shape) * item, transposed=not flat
    )
