"""Reading safetensors by byte range: headers checked before they are used, tensors never mapped.

The format is 8 bytes of header length (little endian), a JSON header, then the data; ``data_offsets`` count from the end of
the header (https://github.com/huggingface/safetensors#format).

The ``safetensors`` package (0.8) bounds headers and offsets as well, and its ``backend="pread"`` maps nothing. But it hides the
offsets, allocates what it returns, reads a whole tensor for a slice of it, and its numpy side knows neither bfloat16 nor
float8: an expert streamed straight into its slot needs a byte range and a buffer of ours.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import POINTER_FIX, is_pointer, open_file, parse_json

__all__ = ["ITEM_BYTES", "TensorInfo", "header_bytes", "is_count", "parse_header", "read_header", "read_into"]

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# The largest real one is under 1 MB. The reference implementation refuses those above 100 MB.
MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 2**17
MAX_NAME_CHARACTERS = 512
MAX_AXES = 32  # a product of millions of them would take hours


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file: safetensors dtype name, shape, and where its bytes lie in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows when all axes but the last are flattened; a vector is one row."""
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes, dtypes and byte ranges of every tensor in ``path``; no tensor is read.

    Raises:
        CheckpointError: the header is longer than the file, not JSON, overlaps, leaves holes or promises more data than
            the file has.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(header_bytes(path, file.read(8), size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_header(path, raw, size)


def header_bytes(path: Path, head: bytes, size: int) -> int:
    """Length of the JSON header, from the first 8 bytes of a file of ``size`` bytes; ``path`` is for messages.

    Raises:
        CheckpointError: the header would be longer than the file, or it is a git-lfs pointer.
    """
    if len(head) < 8:
        raise CheckpointError(f"{path} has {size} bytes; a safetensors file starts with 8 bytes of header length")
    if is_pointer(head):
        raise CheckpointError(f"{path} {POINTER_FIX}")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES and length <= size - 8:
        raise CheckpointError(f"{path}: the header has {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, but the file has {size}; it is truncated or not safetensors"
        )
    return int(length)


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of ``size`` bytes by the JSON header ``raw``; ``path`` becomes theirs.

    Raises:
        CheckpointError: as for ``read_header``.
    """
    header = parse_json(f"{path}: the safetensors header", raw)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: the header lists {len(header)} tensors; no model has more than {MAX_TENSORS}")
    data_start, data_bytes = 8 + len(raw), size - 8 - len(raw)
    tensors = {
        name: _tensor(path, name, entry, data_start, data_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _refuse_gaps(path, tensors, data_start, size)
    return tensors


def read_into(descriptor: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill ``buffer`` (bytes, writable) from ``offset`` of an open file.

    Raises:
        CheckpointError: the file ends early or cannot be read; ``what`` names it.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{what} cannot be read: {error.strerror or error}") from error
        if count == 0:
            raise CheckpointError(f"{what} ends {len(buffer) - done} bytes early; the file was truncated")
        done += count


def _tensor(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {reason}")

    if len(name) > MAX_NAME_CHARACTERS:
        raise CheckpointError(
            f"{path}: a tensor's name has {len(name)} characters; at most {MAX_NAME_CHARACTERS} are read"
        )
    if not isinstance(entry, dict):
        raise bad("has no description in the header")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise bad(f"has dtype {repr(dtype)[:60]}, which is not known")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(is_count(n) for n in shape):
        raise bad(f"has shape {repr(shape)[:200]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(n) for n in offsets):
        raise bad(f"has data offsets {repr(offsets)[:200]}")
    begin, end = offsets
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise bad(f"of shape {shape} and dtype {dtype} needs {nbytes} bytes, its range has {end - begin}")
    if end > data_bytes:
        raise bad(f"ends at byte {end} of the data, but only {data_bytes} are there; the file is truncated")
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, nbytes)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a header is a size or an offset that a file can have."""
    return is_integer(value) and 0 <= value < 2**63


def _refuse_gaps(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The format allows neither shared bytes nor bytes of no tensor: both mean that header and data do not belong together."""
    end, last = data_start, ""
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset < end:
            raise CheckpointError(f"{path}: tensors {last!r} and {info.name!r} share bytes; the header is damaged")
        if info.offset > end:
            raise CheckpointError(f"{path}: {info.offset - end} bytes before tensor {info.name!r} belong to no tensor")
        end, last = info.offset + info.nbytes, info.name
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes at the end belong to no tensor; the header is damaged")
