"""What MLX's first examples wrote, before mlx-lm: ``weights.npz`` or ``weights.N.npz`` and a ``config.json``.

Names are Mistral's own (``layers.N.feed_forward.experts.M.w1.weight``) with queries and keys made for rotary embeddings of
neighbouring rows, or the hub's. Quantised matrices have ``scales`` and ``biases`` beside their ``weight``, as today; the
configuration is then ``params.json``'s with ``quantization``. https://github.com/ml-explore/mlx-examples/tree/main/llms
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import mlx_entry
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.weights.dtypes import as_numpy
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.mlx import MlxSource
from mlx_mixtral_convert.sources.native import NativeCheckpoint, hugging_face_entries, union_of
from mlx_mixtral_convert.sources.row_order import part_halves, read_transposed, rotary_heads
from mlx_mixtral_convert.sources.storage.file import StoredTensor, read_header
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.storage.npz import read_npz

__all__ = ["NpzSource", "detect"]

_EMBEDDING = "tok_embeddings.weight"
# Said of the packing, the layout and the rotary embedding, by files that are params.json otherwise.
_BESIDE = ("quantization", "quantization_config", "model_type", "rope_traditional")


def detect(storage: Storage) -> bool:
    """Whether the weights are npz files, or safetensors of the examples, whose configuration is ``params.json``'s."""
    if storage.glob("model*.safetensors"):
        return False
    if storage.glob("weights*.npz"):
        return True
    config = storage.folder / "config.json"
    found = storage.glob("weights*.safetensors")
    return (
        bool(found) and is_there(config) and "dim" in read_json(config) and _EMBEDDING in read_header(storage, found[0])
    )


class NpzSource(MlxSource):
    """A folder of MLX's first examples.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
        ConfigError: the configuration describes a model of another kind, or a packing the tensors do not have.
    """

    def __init__(self, storage: Storage) -> None:
        files = storage.glob("weights*.npz") or storage.glob("weights*.safetensors")
        if not files:
            raise CheckpointError(f"{storage.path} has no weights*.npz")
        tensors = union_of(
            {file: read_npz(file, storage) if file.suffix == ".npz" else read_header(storage, file) for file in files}
        )
        entries, neighbours = _entries(storage)
        config = MixtralConfig.from_hf(entries)
        self._neighbours = neighbours and _EMBEDDING in tensors
        self._whole: tuple[str, npt.NDArray[Any]] = "", np.empty((0, 0), np.uint8)
        super().__init__(storage, NativeCheckpoint(storage, config, tensors), entries)
        for parts in self._parts.values():
            for rows in (rows for found in parts.values() for rows in found):
                info = self.checkpoint[rows.name]
                if isinstance(info, StoredTensor) and info.transposed:
                    raise CheckpointError(
                        f"{info.file}: array {info.name!r} is stored in column order; save a contiguous copy"
                    )

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        if isinstance(info, StoredTensor) and info.transposed:
            read_transposed(self._reader, info, skip_bytes, into)
        else:
            super()._fill(matrix, info, skip_bytes, into)
        if (heads := self._paired(matrix)) is not None:
            part_halves(into.array, heads)

    def _rows(self, matrix: Matrix, field: Field, expert: int, block: slice) -> tuple[npt.NDArray[Any], str]:
        if (heads := self._paired(matrix)) is None:
            return super()._rows(matrix, field, expert, block)
        # Rows come from all over the matrix, which is read once.
        info = self.checkpoint[self._parts[matrix.path][field][expert].name]
        if self._whole[0] != info.name:
            held = self._reader.rows(info, 0, info.rows)
            part_halves(held, heads)
            self._whole = info.name, held
        return as_numpy(self._whole[1][block], info.dtype), info.dtype

    def _paired(self, matrix: Matrix) -> int | None:
        """How many heads' rows have to be parted, None for a matrix whose rows are in order."""
        return rotary_heads(matrix, self.config) if self._neighbours else None


def _entries(storage: Storage) -> tuple[Mapping[str, Any], bool]:
    """The configuration in Hugging Face's terms, and whether it rotates neighbouring rows together."""
    named = next((name for name in ("config.json", "params.json") if is_there(storage.folder / name)), None)
    if named is None:
        raise CheckpointError(
            f"{storage.path} has neither config.json nor params.json to say what model its weights are; put "
            "the original one next to them"
        )
    entries = read_json(storage.folder / named)
    if "hidden_size" in entries:
        return entries, True
    params = {key: value for key, value in entries.items() if key not in _BESIDE}
    # The examples' own default, which is Mixtral's where it has experts.
    params.setdefault("rope_theta", 1e6 if "moe" in params else 1e4)
    quantization = mlx_entry(entries)
    packed = {} if quantization is None else {"quantization": quantization}
    return hugging_face_entries(MixtralConfig.from_params(params)) | packed, entries.get(
        "rope_traditional", True
    ) is True
