"""Hugging Face folders of PyTorch files: ``pytorch_model.bin``, or several and their index."""

from __future__ import annotations

from pathlib import Path

from mlx_mixtral.config import read_json
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.layout import Matrix
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.sources.arranged import read_transposed
from mlx_mixtral_convert.sources.base import Values
from mlx_mixtral_convert.sources.hf import HuggingFaceSource
from mlx_mixtral_convert.sources.torch_files import StoredTensor, read_torch

__all__ = ["INDEX", "SINGLE", "TorchCheckpoint", "TorchSource", "detect", "open_path"]

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def detect(path: Path) -> bool:
    """Whether ``path`` is a folder with a Hugging Face configuration and no weights but PyTorch's."""
    if not (path / "config.json").is_file() or next(path.glob("*.safetensors"), None) is not None:
        return False
    return (path / INDEX).is_file() or (path / SINGLE).is_file()


def open_path(path: Path) -> TorchSource:
    """Open a folder."""
    return TorchSource(path, TorchCheckpoint(path))


class TorchCheckpoint(Checkpoint):
    """The tensors of a folder's ``pytorch_model*.bin`` files by name; the index decides, where there is one.

    Raises:
        CheckpointError: no weights, an index that names an absent file or one outside the folder, a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / INDEX).is_file():
            if not (folder / SINGLE).is_file():
                raise CheckpointError(f"{folder} has no PyTorch weights: neither {INDEX} nor {SINGLE}")
            self._tensors = dict(read_torch(folder / SINGLE))
            return
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: there is no weight_map")
        files: dict[str, dict[str, StoredTensor]] = {}
        present = {entry.name for entry in folder.iterdir()}
        self._tensors = {}
        for name, file in weight_map.items():
            # A name from the listing of the folder cannot lead out of it.
            if not isinstance(file, str) or file not in present:
                raise CheckpointError(
                    f"{folder / INDEX}: tensor {name!r} is placed in {file!r}, not a file of this folder"
                )
            if file not in files:
                files[file] = read_torch(folder / file)
            if name not in files[file]:
                raise CheckpointError(f"{folder / INDEX} places tensor {name!r} in {file!r}, which does not have it")
            self._tensors[name] = files[file][name]


class TorchSource(HuggingFaceSource):
    """A folder whose tensors may lie column by column, as transposed views were saved."""

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        if isinstance(info, StoredTensor) and info.transposed:
            read_transposed(self._reader, info, skip_bytes, into)
        else:
            super()._fill(matrix, info, skip_bytes, into)
