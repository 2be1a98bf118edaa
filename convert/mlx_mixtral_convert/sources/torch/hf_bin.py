"""Hugging Face folders of PyTorch files: ``pytorch_model.bin``, or several and their index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.reading import is_there
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.hf import HuggingFaceSource
from mlx_mixtral_convert.sources.row_order import read_transposed
from mlx_mixtral_convert.sources.storage.file import StoredCheckpoint, StoredTensor
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.files import read_torch

__all__ = ["INDEX", "SINGLE", "TorchCheckpoint", "TorchSource", "detect"]

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def detect(storage: Storage) -> bool:
    """Whether there is a Hugging Face configuration and no weights but PyTorch's."""
    if not is_there(storage.folder / "config.json") or storage.glob("*.safetensors"):
        return False
    return is_there(storage.folder / INDEX) or bool(storage.glob("pytorch_model*.bin"))


class TorchCheckpoint(StoredCheckpoint):
    """The tensors of all ``pytorch_model*.bin`` files by name; the index decides, where there is one."""

    index_name, single_name = INDEX, SINGLE

    def _header(self, file: str) -> Mapping[str, TensorInfo]:
        return read_torch(self._storage.at(file), self._storage)


class TorchSource(HuggingFaceSource):
    """A folder whose tensors may lie column by column, as transposed views were saved."""

    def __init__(
        self, storage: Storage, checkpoint: Checkpoint | None = None, entries: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(storage, TorchCheckpoint(storage) if checkpoint is None else checkpoint, entries)

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        if isinstance(info, StoredTensor) and info.transposed:
            read_transposed(self._reader, info, skip_bytes, into)
        else:
            super()._fill(matrix, info, skip_bytes, into)
