"""What a folder is that holds no model the runtime can read: an adapter, or weights that have to be converted first."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import read_json

__all__ = ["is_adapter", "must_convert", "refuse_adapter", "refuse_foreign"]

_ADAPTER_CONFIG = "adapter_config.json"
# Of PEFT and of mlx-lm.
_ADAPTERS = ("adapter*.safetensors", "*_adapters.safetensors", "adapter*.bin", "adapter*.npz")
# Weights that the converter reads, and what they are.
_CONVERTIBLE = (
    ("*.gguf", "a GGUF file"),
    ("consolidated*", "Mistral's own files"),
    ("weights*.npz", "files of MLX's first examples"),
    ("*.bin", "PyTorch files"),
    ("*.pth", "PyTorch files"),
    ("*.pt", "PyTorch files"),
)


def is_adapter(name: str) -> bool:
    """Whether a file of this name holds an adapter's weights."""
    return any(fnmatchcase(name, pattern) for pattern in _ADAPTERS)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for the folder of an adapter, which is no model by itself."""
    if (folder / "config.json").is_file() or not (folder / _ADAPTER_CONFIG).is_file():
        return
    entries = read_json(folder / _ADAPTER_CONFIG)
    named = entries.get("base_model_name_or_path") or entries.get("model")
    # A stranger's text, as a terminal can be given it.
    base = repr(named)[1:-1][:200] if isinstance(named, str) and named else None
    kind = "PEFT" if "peft_type" in entries else "mlx-lm"
    raise CheckpointError(
        f"{folder} holds an adapter of {kind}, which modifies {base or 'another model'} and is not a model "
        f"itself; use it beside its model: mlx-mixtral generate {base or 'MODEL'} --adapter {folder}; or fuse the two: "
        f"mlx-mixtral convert {base or 'MODEL'} DEST --adapter {folder}"
    )


def refuse_foreign(names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError where files called ``names`` have to be converted before they run, or are an adapter's alone."""
    listed = sorted(names)
    for pattern, what in _CONVERTIBLE:
        for name in listed:
            if fnmatchcase(name, pattern) and not is_adapter(name):
                raise must_convert(folder, what, name)
    for name in filter(is_adapter, listed):
        raise CheckpointError(
            f"{folder} holds an adapter ({name}) and no model; use it beside the model it was trained on: mlx-mixtral generate "
            f"MODEL --adapter {folder}; or fuse the two: mlx-mixtral convert MODEL DEST --adapter {folder}"
        )


def must_convert(folder: Path, what: str, file: str) -> CheckpointError:
    """The error for a folder whose weights are in ``file``, and only the converter reads them."""
    return CheckpointError(
        f"{folder} holds {what} ({file}), which must be converted first: mlx-mixtral convert {folder} DEST"
    )
