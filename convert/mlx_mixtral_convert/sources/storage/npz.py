"""Numpy's ``.npz`` files, as MLX's first examples wrote weights: a zip of ``NAME.npy`` entries, read by byte range.

Each entry is a magic number, a header (a Python dictionary of literals) and the values
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). An array of Python objects would be a pickle; it is
refused, and nothing is run.
"""

from __future__ import annotations

import ast
import zipfile
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import ITEM_BYTES, MAX_AXES, is_count
from mlx_mixtral_convert.sources.storage.archive import (
    THREADS,
    ZIP_ERRORS,
    data_starts,
    entries_of,
    open_archive,
    plain_entry,
)
from mlx_mixtral_convert.sources.storage.file import StoredTensor, refuse_pointer
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["read_npz"]

_MAGIC = b"\x93NUMPY"
# Real headers have under 200 bytes.
MAX_NPY_HEADER_BYTES = 4096
# MLX writes bfloat16 as two bytes of no type.
_DTYPES = {
    "<f4": "F32", "<f2": "F16", "<V2": "BF16", "|V2": "BF16", "<f8": "F64", "<u4": "U32", "<i4": "I32", "<u2": "U16",
    "<i2": "I16", "|u1": "U8", "|i1": "I8", "<u8": "U64", "<i8": "I64", "|b1": "BOOL",
}  # fmt: skip


def read_npz(path: Path, storage: Storage) -> dict[str, StoredTensor]:
    """Names, shapes, dtypes and byte ranges of every array in ``path``, a file of ``storage``; no array is read.

    Raises:
        CheckpointError: not a zip, truncated, compressed, an entry that is no array, or one of Python objects.
    """
    try:
        with storage.open(path) as file, open_archive(file) as archive:
            entries = {name: plain_entry(path, entry) for name, entry in entries_of(path, archive).items()}
    except ZIP_ERRORS as error:
        refuse_pointer(storage, path)
        raise CheckpointError(f"{path} is not a readable npz file: {error}; it is truncated") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    starts = data_starts(path, storage, entries.values())
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
        found = pool.map(lambda at: _array(path, storage, *at), zip(entries.values(), starts, strict=True))
        return {info.name: info for info in found}


def _array(path: Path, storage: Storage, entry: zipfile.ZipInfo, start: int) -> StoredTensor:
    name, size = entry.filename.removesuffix(".npy"), entry.file_size

    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: array {name!r} {reason}")

    head = bytearray(min(size, MAX_NPY_HEADER_BYTES))
    storage.read_into(path, memoryview(head), start)
    # Version 1 has two bytes for the header's length, the later ones four.
    wide = 2 if head[6:7] == b"\1" else 4
    first = 8 + wide
    if head[:6] != _MAGIC or len(head) < first:
        raise bad("does not begin as numpy's arrays do")
    end = first + int.from_bytes(head[8:first], "little")
    if end > len(head):
        raise bad(f"has a header of {end - first} bytes; at most {MAX_NPY_HEADER_BYTES} are read")
    try:
        header = ast.literal_eval(head[first:end].decode("latin1").strip())
        kind, shape, by_column = header["descr"], header["shape"], header["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise bad("has a damaged header") from error
    if isinstance(kind, str) and kind.endswith("O"):
        raise bad("holds Python objects, which are not read because they could run code")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise bad(f"has type {str(kind)[:40]!r}; only little-endian numbers are supported")
    if not isinstance(shape, tuple) or len(shape) > MAX_AXES or not all(map(is_count, shape)):
        raise bad(f"has shape {repr(shape)[:200]}")
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if end + nbytes != size:
        raise bad(f"of shape {list(shape)} needs {nbytes} bytes, but its entry has {size - end}; the file is damaged")
    turned = bool(by_column) and sum(axis > 1 for axis in shape) > 1
    if turned and len(shape) != 2:
        raise bad(f"of shape {list(shape)} is stored in column order; save a contiguous copy")
    return StoredTensor(name, path, dtype, shape, start + end, nbytes, transposed=turned)
