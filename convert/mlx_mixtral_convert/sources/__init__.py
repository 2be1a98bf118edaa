"""Input layouts: what a folder or file holds decides which module reads it, unless the caller says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import cast

from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral_convert.sources.base import (
    GeneratedFiles,
    NativePacking,
    PackedSource,
    SourceFiles,
    TensorSource,
    Values,
)

__all__ = [
    "KINDS", "GeneratedFiles", "NativePacking", "PackedSource", "SourceFiles", "TensorSource", "Values", "detect",
    "open_source",
]  # fmt: skip

# Kind -> the module that reads it, asked in this order. A module has ``detect(path) -> bool``, which looks at content and
# reads little, and ``open_path(path) -> TensorSource``.
KINDS: dict[str, str] = {
    "gguf": "gguf",
    "mlx": "mlx",
    "awq": "awq",
    "gptq": "gptq",
    "fp8": "fp8",
    "hf-bin": "hf_bin",
    "native": "native",
    "hf": "hf",
}


def detect(path: Path) -> str:
    """The kind of checkpoint at ``path``, a folder or a file.

    Raises:
        CheckpointError: no layout known here.
    """
    for kind in KINDS:
        if _module(kind).detect(path):
            return kind
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint that can be converted")
    found = sorted(entry.name for entry in path.iterdir())[:4]
    raise CheckpointError(
        f"{path} is not a checkpoint that can be converted: there is no config.json"
        + (f", only {', '.join(found)}" if found else "; it is empty")
    )


def open_source(path: Path, kind: str = "auto") -> TensorSource:
    """Open the checkpoint at ``path``; its content says which layout it is, not its name.

    Args:
        kind: one of ``KINDS`` to skip the detection.

    Raises:
        InvalidRequestError: an unknown ``kind``.
        CheckpointError: no layout known here, or a damaged one.
        ConfigError: another architecture.
        ConversionError: the weights are quantised already, in a way that cannot be read.
    """
    if kind not in ("auto", *KINDS):
        raise InvalidRequestError(f"source kind {kind!r} is unknown; use auto, {', '.join(KINDS)}")
    return cast("TensorSource", _module(detect(path) if kind == "auto" else kind).open_path(path))


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{KINDS[kind]}")
