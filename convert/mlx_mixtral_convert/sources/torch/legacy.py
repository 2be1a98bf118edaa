"""Files as torch wrote them before 1.6 (and still does on request): pickles in a row, then the storages.

    a magic number, a protocol version, facts of the machine      a pickle each
    the tensors                                                   a pickle; storages are references: type, key, numel
    the keys of the storages                                      a pickle of a list
    for each key in that order                                    numel as 8 bytes, then its values

https://github.com/pytorch/pytorch/blob/v1.5.0/torch/serialization.py
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.pickle import (
    PickleError,
    TensorDescription,
    TorchStorage,
    read_pickle,
    tensors_of,
)

__all__ = ["is_legacy", "read_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# The magic number as a pickle: a long of ten bytes.
_BEGINS = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
# All pickles together; the largest real ones have under a megabyte.
MAX_HEAD_BYTES = 8 * 2**20


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins with ``head`` begins with the magic number."""
    return _BEGINS in head[:32]


def read_legacy(path: Path, storage: Storage) -> tuple[dict[str, TensorDescription], dict[str, int], dict[str, int]]:
    """The tensors, and where each storage begins and how many bytes it has.

    Raises:
        CheckpointError: damaged or truncated, or written on a big-endian machine.
        PickleError: a pickle asks for anything but tensors.
        OSError: it cannot be read.
    """
    size = storage.look(path)[0]
    with storage.open(path) as file:
        head = io.BytesIO(file.read(min(size, MAX_HEAD_BYTES)))
    storages: dict[str, TorchStorage] = {}
    magic, protocol, machine = (read_pickle(head) for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(machine, Mapping):
        raise CheckpointError(f"{path}: the header of the torch file is damaged")
    if machine.get("little_endian") is not True:
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
    described, keys = tensors_of(read_pickle(head, storages)), read_pickle(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise PickleError("the list of storages is damaged")
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    at = head.tell()
    for key in keys:
        if (held := storages.get(key)) is None:
            raise CheckpointError(
                f"{path}: no tensor is in storage {key!r}, so its size is unknown; the file is damaged"
            )
        starts[key], sizes[key] = at + 8, held.numel * ITEM_BYTES[held.dtype]
        if starts[key] + sizes[key] > size:
            raise CheckpointError(f"{path}: storage {key!r} ends beyond the file's {size} bytes; it is truncated")
        count = bytearray(8)
        storage.read_into(path, memoryview(count), at)
        if struct.unpack("<q", count) != (held.numel,):
            raise CheckpointError(f"{path}: storage {key!r} is not where it should be; the file is damaged")
        at = starts[key] + sizes[key]
    for name, tensor in described.items():
        if tensor.storage.key not in starts:
            raise CheckpointError(
                f"{path}: tensor {name!r} is in storage {tensor.storage.key!r}, which is not in the file"
            )
    return described, starts, sizes
