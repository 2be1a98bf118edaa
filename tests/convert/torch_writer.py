"""Files as torch.save writes them, put together operation by operation so that a test can bend any part."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}


@dataclass(frozen=True)
class View:
    """A tensor as a view of a storage of its own; what is None follows from ``array``, which is stored row by row."""

    array: Array
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    offset: int = 0
    numel: int | None = None


def transposed(array: Array) -> View:
    """``array`` saved as the transpose of what is stored."""
    return View(np.ascontiguousarray(array.T), array.shape, (1, array.shape[0]))


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


EMPTY = named("collections", "OrderedDict") + b")R"


def stored(array: Array, dtype: str) -> bytes:
    if dtype == "BF16":
        return np.array(mx.array(array.astype(np.float32)).astype(mx.bfloat16).view(mx.uint16)).tobytes()
    return array.astype({"F32": np.float32, "F16": np.float16, "I64": np.int64}[dtype]).tobytes()


def tensor_operations(view: View, key: str, dtype: str) -> bytes:
    shape = view.array.shape if view.shape is None else view.shape
    plain = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    storage = b"(" + text("storage") + named("torch", STORAGES[dtype]) + text(key) + text("cpu")
    storage += number(view.array.size if view.numel is None else view.numel) + b"tQ"
    arguments = (
        storage + number(view.offset) + numbers(shape) + numbers(plain if view.strides is None else view.strides)
    )
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + EMPTY + b"tR"


def save_torch(
    path: Path,
    tensors: Mapping[str, Array | View],
    dtype: str = "BF16",
    *,
    pickle: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
    byteorder: str = "little",
) -> Path:
    """Write ``tensors``; ``pickle`` replaces the description of them."""
    views = {name: value if isinstance(value, View) else View(value) for name, value in tensors.items()}
    kinds = {name: "I64" if view.array.dtype == np.int64 else dtype for name, view in views.items()}
    if pickle is None:
        items = [
            text(name) + tensor_operations(view, str(k), kinds[name]) for k, (name, view) in enumerate(views.items())
        ]
        pickle = b"\x80\x02" + EMPTY + b"(" + b"".join(items) + b"u."
    root = path.stem
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, (name, view) in enumerate(views.items()):
            archive.writestr(f"{root}/data/{key}", stored(view.array, kinds[name]))
        archive.writestr(f"{root}/version", "3\n")
    return path
