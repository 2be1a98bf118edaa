"""Input layouts: what a folder or file holds decides which module reads it, unless the caller says."""

from __future__ import annotations

import importlib
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import cast

from mlx_mixtral.config.folder import refuse_adapter
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral_convert.sources.base import (
    GeneratedFiles,
    PackedSource,
    SourceFiles,
    TensorSource,
    main_dtype,
    matrix_bytes,
    small_files,
    tensor_place,
)
from mlx_mixtral_convert.sources.storage.file import refuse_pointer
from mlx_mixtral_convert.sources.storage.local import LocalStorage, Storage

__all__ = [
    "KINDS", "GeneratedFiles", "PackedSource", "SourceFiles", "Storage", "TensorSource",
    "detect", "main_dtype", "matrix_bytes", "open_source", "small_files", "tensor_place",
]  # fmt: skip

# Kind -> the module that reads it and its class, asked in this order. A module has ``detect(storage) -> bool``, which looks at
# content and reads little; the class takes a storage and is a TensorSource.
KINDS: dict[str, tuple[str, str]] = {
    "gguf": ("gguf.source", "GgufSource"),
    "npz": ("npz", "NpzSource"),
    "mlx": ("mlx", "MlxSource"),
    "awq": ("packed.awq", "AwqSource"),
    "gptq": ("packed.gptq", "GptqSource"),
    "fp8": ("packed.fp8", "Fp8Source"),
    "compressed-tensors": ("packed.compressed", "CompressedSource"),
    "modelopt": ("packed.modelopt", "ModelOptSource"),
    "bitsandbytes": ("packed.bitsandbytes", "BitsAndBytesSource"),
    "hf-bin": ("torch.hf_bin", "TorchSource"),
    "native": ("native", "NativeSource"),
    "hf": ("hf", "HuggingFaceSource"),
}
# Those whose model may be one file among others.
_ONE_FILE = ("gguf",)


def detect(place: Path | Storage) -> str:
    """The kind of checkpoint at a folder or file, or in a storage.

    Raises:
        CheckpointError: no layout known here.
    """
    if isinstance(place, Path):
        with closing(LocalStorage(place)) as storage:
            return detect(storage)
    for kind in KINDS if place.named is None else _ONE_FILE:
        if _module(kind).detect(place):
            return kind
    for file in place.glob("*.gguf") if place.named is None else [place.named]:
        refuse_pointer(place, file)
    if place.named is not None or not place.folder.is_dir():
        raise CheckpointError(f"{place.path} is not a checkpoint that can be converted")
    refuse_adapter(place.folder)
    found = [file.name for file in place.glob("*")][:4]
    raise CheckpointError(
        f"{place.path} is not a checkpoint that can be converted: it has no config.json"
        + (f", only {', '.join(found)}" if found else "; it is empty")
    )


def open_source(place: Path | Storage, kind: str = "auto") -> TensorSource:
    """Open the checkpoint at a folder or file, or in a storage; its content says which layout it is, not its name.

    Args:
        place: a storage is the source's from now on, and closed with it.
        kind: one of ``KINDS`` to skip the detection.

    Raises:
        InvalidRequestError: an unknown ``kind``.
        CheckpointError: no layout known here, or a damaged one.
        ConfigError: another architecture.
        ConversionError: the weights are quantised already, in a way that cannot be read.
    """
    if kind not in ("auto", *KINDS):
        raise InvalidRequestError(f"source kind {kind!r} is unknown; use auto, {', '.join(KINDS)}")
    storage = LocalStorage(place) if isinstance(place, Path) else place
    try:
        kind = detect(storage) if kind == "auto" else kind
        if storage.named is not None and kind not in _ONE_FILE:
            raise CheckpointError(f"{storage.path} is one file; kind {kind} is read from a folder")
        return cast("TensorSource", getattr(_module(kind), KINDS[kind][1])(storage))
    except BaseException:
        storage.close()
        raise


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{KINDS[kind][0]}")
