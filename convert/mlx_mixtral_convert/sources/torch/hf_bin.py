"""Hugging Face folders of PyTorch files: ``pytorch_model.bin``, or several and their index."""

from __future__ import annotations

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.files import read_json
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.hf import HuggingFaceSource
from mlx_mixtral_convert.sources.row_order import read_transposed
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.files import StoredTensor, read_torch

__all__ = ["INDEX", "SINGLE", "TorchCheckpoint", "TorchSource", "detect", "open_storage"]

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def detect(storage: Storage) -> bool:
    """Whether there is a Hugging Face configuration and no weights but PyTorch's."""
    if not (storage.folder / "config.json").is_file() or storage.glob("*.safetensors"):
        return False
    return (storage.folder / INDEX).is_file() or storage.has(SINGLE)


def open_storage(storage: Storage) -> TorchSource:
    return TorchSource(storage, TorchCheckpoint(storage))


class TorchCheckpoint(Checkpoint):
    """The tensors of all ``pytorch_model*.bin`` files by name; the index decides, where there is one.

    Raises:
        CheckpointError: no weights, an index that names an absent file or one outside the folder, a damaged file.
    """

    def __init__(self, storage: Storage) -> None:
        self.folder, index = storage.path, storage.folder / INDEX
        if not index.is_file():
            if not storage.has(SINGLE):
                raise CheckpointError(f"{storage.path} has no PyTorch weights: neither {INDEX} nor {SINGLE}")
            self._tensors = dict(read_torch(storage.at(SINGLE), storage))
            return
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: there is no weight_map")
        files: dict[str, dict[str, StoredTensor]] = {}
        present = {file.name: file for file in storage.glob("*")}
        self._tensors = {}
        for name, file in weight_map.items():
            # A name from the listing of the folder cannot lead out of it.
            if not isinstance(file, str) or file not in present:
                raise CheckpointError(f"{index}: tensor {name!r} is placed in {file!r}, not a file of this folder")
            if file not in files:
                files[file] = read_torch(present[file], storage)
            if name not in files[file]:
                raise CheckpointError(f"{index} places tensor {name!r} in {file!r}, which does not have it")
            self._tensors[name] = files[file][name]


class TorchSource(HuggingFaceSource):
    """A folder whose tensors may lie column by column, as transposed views were saved."""

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        if isinstance(info, StoredTensor) and info.transposed:
            read_transposed(self._reader, info, skip_bytes, into)
        else:
            super()._fill(matrix, info, skip_bytes, into)
