"""The head of a GGUF file: keys and tensor descriptions, read with every count checked against the bytes there are.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. A file comes from a
stranger: a count or length is trusted only when the rest of the file could hold it, and a head has a largest size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import POINTER_FIX, is_pointer
from mlx_mixtral_convert.sources.gguf.types import TYPES, GgufTensor, GgufType
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["MAGIC", "GgufHeader", "LocatedTensor", "is_gguf", "read_header"]

MAGIC = b"GGUF"
# The largest known, with 256 thousand tokens and their merges, has 20 MB and 1.3 million values in lists.
MAX_HEAD_BYTES = 64 * 2**20
MAX_KEYS, MAX_TENSORS, MAX_AXES, MAX_VALUES = 2**16, 2**17, 4, 2**21
MAX_NAME_BYTES = 2**16 - 1

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class LocatedTensor(GgufTensor):
    """One whose bytes lie in ``file`` from ``offset`` on, counted from its start."""

    file: Path
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of one file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, LocatedTensor]


def is_gguf(storage: Storage, path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    head = bytearray(len(MAGIC))
    try:
        if storage.look(path)[0] < len(head):
            return False
        storage.read_into(path, memoryview(head), 0)
    except (CheckpointError, OSError):
        return False
    return head == MAGIC


def read_header(path: Path, storage: Storage) -> GgufHeader:
    """Read the head of a file of ``storage``, and check that its tensors fill the rest of it, each at its place.

    Raises:
        CheckpointError: not GGUF, another version or byte order, truncated, absurd counts, a type not known here, tensors
            that share bytes or leave gaps.
    """
    try:
        with storage.open(path) as file:
            return _Head(path, file, storage.look(path)[0]).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _Head:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.at, self.values = path, size, 0, 0
        self._file = file

    def read(self) -> GgufHeader:
        if (magic := self.bytes(4, "the magic")) != MAGIC:
            if is_pointer(magic + self._file.read(4)):
                raise self.error(POINTER_FIX)
            raise self.error("is not a GGUF file: it does not begin with 'GGUF'")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise self.error("is a big-endian GGUF file, which is not supported; use a little-endian one")
        if version not in (2, 3):
            raise self.error(f"is a GGUF file of version {version}; versions 2 and 3 are supported: convert it again")
        tensor_count, key_count = self.number("<Q"), self.number("<Q")
        self.check_count(tensor_count, 24, MAX_TENSORS, "tensors")
        self.check_count(key_count, 13, MAX_KEYS, "keys")
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            name = self.string("a key", MAX_NAME_BYTES)
            if name in keys:
                raise self.error(f"has the key {name!r} twice")
            keys[name] = self.value(self.number("<I"), name)
        described = [self.tensor() for _ in range(tensor_count)]
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self.error(f"has general.alignment {alignment!r}; it must be a power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, LocatedTensor] = {}
        for name, kind, shape, offset in described:
            if name in tensors:
                raise self.error(f"has the tensor {name!r} twice")
            tensor = LocatedTensor(name, kind, shape, self.path, start + offset)
            if tensor.offset + tensor.nbytes > self.size:
                raise self.error(
                    f"is truncated: tensor {name!r} ends at byte {tensor.offset + tensor.nbytes} of {self.size}; "
                    "download it again"
                )
            tensors[name] = tensor
        self.check_places(list(tensors.values()), start, alignment)
        return GgufHeader(self.path, keys, tensors)

    def check_places(self, tensors: list[LocatedTensor], start: int, alignment: int) -> None:
        """Refuse tensors that share bytes, or have more between them than aligns them: the head is not that of this data."""
        end, last = start, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.error(f"is damaged: tensors {last!r} and {tensor.name!r} share bytes; download it again")
            if tensor.offset != -(-end // alignment) * alignment:
                raise self.error(
                    f"is damaged: {tensor.offset - end} bytes before tensor {tensor.name!r} belong to no "
                    f"tensor, and it must begin at a multiple of {alignment}; download it again"
                )
            end, last = tensor.offset + tensor.nbytes, tensor.name

    def tensor(self) -> tuple[str, GgufType, tuple[int, ...], int]:
        name = self.string("a tensor's name", MAX_NAME_BYTES)
        axes = self.number("<I")
        if not 1 <= axes <= MAX_AXES:
            raise self.error(f"says that tensor {name!r} has {axes} axes; it must have 1 to {MAX_AXES}")
        shape = tuple(reversed([self.number("<Q") for _ in range(axes)]))
        if not 0 < prod(shape) < 2**40:
            raise self.error(f"says that tensor {name!r} has shape {list(shape)}, which is not possible")
        number, offset = self.number("<I"), self.number("<Q")
        if (kind := TYPES.get(number)) is None:
            raise self.error(f"holds tensor {name!r} in type {number}, which is not one of the types that can be read")
        if shape[-1] % kind.weights:
            raise self.error(f"says that tensor {name!r} has rows of {shape[-1]}, not whole {kind.name} blocks")
        return name, kind, shape, offset

    def value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {name!r}", MAX_HEAD_BYTES)
        if kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item == _STRING:
                self.check_values(count, 8, name)
                return [self.string(f"the value of {name!r}", MAX_HEAD_BYTES) for _ in range(count)]
            if item not in _SCALARS:
                raise self.error(f"has an array of type {item} at key {name!r}, which GGUF does not define")
            code = _SCALARS[item]
            self.check_values(count, struct.calcsize(code), name)
            raw = self.bytes(count * struct.calcsize(code), f"the values of {name!r}")
            return np.frombuffer(raw, np.dtype(code)).tolist()
        if kind not in _SCALARS:
            raise self.error(f"has a value of type {kind} at key {name!r}, which GGUF does not define")
        scalar = self.number(_SCALARS[kind])
        return bool(scalar) if kind == _BOOL else scalar

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.bytes(struct.calcsize(code), "its head"))[0]

    def string(self, what: str, max_bytes: int) -> str:
        length = self.number("<Q")
        if length > max_bytes:
            raise self.error(f"says that {what} has {length} bytes; at most {max_bytes} are read")
        try:
            return self.bytes(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"holds {what} that is not UTF-8 ({error.reason})") from error

    def check_values(self, count: int, item_bytes: int, name: str) -> None:
        """``check_count`` of a list at a key, and of all lists there are."""
        self.check_count(count, item_bytes, MAX_HEAD_BYTES, f"values of {name!r}")
        self.values += count
        if self.values > MAX_VALUES:
            raise self.error(f"has more than {MAX_VALUES} values in the lists of its header; no model has that many")

    def check_count(self, count: int, item_bytes: int, max_count: int, what: str) -> None:
        if count > max_count or count * item_bytes > self.size - self.at:
            raise self.error(f"says it has {count} {what}, more than its {self.size} bytes can hold")

    def bytes(self, count: int, what: str) -> bytes:
        if self.at + count > self.size:
            raise self.error(f"is truncated: {what} reaches past its {self.size} bytes; download it again")
        if self.at + count > MAX_HEAD_BYTES:
            raise self.error(f"has a header of more than {MAX_HEAD_BYTES} bytes; no model has one that large")
        data = self._file.read(count)
        if len(data) != count:
            raise self.error("became shorter while it was being read")
        self.at += count
        return data

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")
