"""Mistral's own files: ``params.json`` and ``consolidated*`` weights, experts apart or stacked.

    apart      layers.N.feed_forward.experts.M.{w1,w2,w3}.weight     [out, in]        8x22B, and the first release of 8x7B
    stacked    layers.N.block_sparse_moe.{w1,w2,w3}                  [E * F, D]       consolidated.00.pt … 07.pt of 8x7B

Stacked, w2 lies transposed, so that the three look alike. Eight files of the stacked kind share the tensors out: a name is in
one of them, or in several that hold the same. Queries and keys are made for rotary embeddings of neighbouring rows.
https://github.com/mistralai/mistral-inference and transformers' convert_mixtral_weights_to_hf.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_mixtral.config.layout import EXPERT_NAMES, Matrix
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.supported import ARCHITECTURES
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.names import unwrapped
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.row_order import part_halves, rotary_heads
from mlx_mixtral_convert.sources.storage.file import StoredTensor, read_header
from mlx_mixtral_convert.sources.storage.local import Storage
from mlx_mixtral_convert.sources.torch.files import read_torch
from mlx_mixtral_convert.sources.torch.hf_bin import TorchSource

__all__ = ["NativeCheckpoint", "NativeSource", "detect", "hugging_face_entries", "union_of"]

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"attention.w{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"feed_forward.{w}.weight": f"mlp.{name}.weight" for name, w in EXPERT_NAMES.items()},
    "feed_forward.gate.weight": "block_sparse_moe.gate.weight",
    **{f"block_sparse_moe.{w}": f"block_sparse_moe.switch_mlp.{name}.weight" for name, w in EXPERT_NAMES.items()},
}
_NATIVE = {new: old for old, new in _IN_LAYER.items()}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"feed_forward\.(experts\.\d+\.w[123]\.weight)")
# Follows from the configuration.
_DERIVED = "rope.freqs"


def detect(storage: Storage) -> bool:
    """Whether the only weights are Mistral's own."""
    if storage.glob("model*.safetensors") or storage.glob("pytorch_model*.bin"):
        return False
    files = _weight_files(storage)
    # Another model's only file may have any name.
    return bool(files) and (files[0].suffix != ".safetensors" or "tok_embeddings.weight" in _union(files, storage))


def hugging_face_entries(config: MixtralConfig) -> dict[str, Any]:
    """The ``config.json`` entries of a model read from ``params.json``."""
    entries: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids),
        "rope_theta": config.rope.theta,
    }
    same = [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "sliding_window", "tie_word_embeddings",
    ]  # fmt: skip
    if not config.is_dense:
        same += ["num_local_experts", "num_experts_per_tok"]
    return entries | {key: getattr(config, key) for key in same}


class NativeSource(TorchSource):
    """``params.json`` and ``consolidated*`` files: one or more of safetensors, ``.pth`` or ``.pt``.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or not of a float type; a damaged file.
        ConfigError: params.json describes a model of another kind.
    """

    def __init__(self, storage: Storage) -> None:
        entries = _entries(storage)
        config = MixtralConfig.from_hf(entries)
        files = _weight_files(storage)
        if not files:
            raise CheckpointError(
                f"{storage.path} has no consolidated*.safetensors, consolidated.*.pth or consolidated.*.pt"
            )
        super().__init__(storage, NativeCheckpoint(storage, config, _union(files, storage)), entries)

    def _fill(self, matrix: Matrix, info: TensorInfo, skip_bytes: int, into: Values) -> None:
        super()._fill(matrix, info, skip_bytes, into)
        if (heads := rotary_heads(matrix, self.config)) is not None:
            part_halves(into.array, heads)

    def _missing(self, matrix: Matrix) -> str:
        return _native_name(super()._missing(matrix))


class NativeCheckpoint(Checkpoint):
    """Mistral's ``tensors`` under the names of the other layouts; messages use their own."""

    def __init__(self, storage: Storage, config: MixtralConfig, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = storage.path
        self._tensors = {}
        for name, info in tensors.items():
            if (known := self._tensors.get(_renamed(name))) is not None:
                raise CheckpointError(
                    f"{info.file}: tensors {known.name!r} and {name!r} are two names of the same tensor; remove one of them"
                )
            if name != _DERIVED:
                self._tensors[_renamed(name)] = _apart(info, config)

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {_native_name(name)!r} is missing")
        return self._tensors[name]


def _entries(storage: Storage) -> Mapping[str, Any]:
    folder = storage.folder
    if not is_there(folder / "params.json"):
        if not is_there(folder / "config.json"):
            raise CheckpointError(
                f"{storage.path} has Mistral's own weights, but not params.json, which describes them; put the "
                "original one next to them"
            )
        return read_json(folder / "config.json")
    params = read_json(folder / "params.json")
    if "hidden_size" not in params:
        return hugging_face_entries(MixtralConfig.from_params(params))
    # The release with stacked experts wrote the newer names, and its window as text.
    window = params.get("sliding_window")
    if isinstance(window, str):
        if not window.isdecimal():
            raise ConfigError(f"{folder / 'params.json'}: sliding_window is {window!r}, not a number")
        params["sliding_window"] = int(window)
    return {"model_type": "mixtral", "architectures": [ARCHITECTURES["mixtral"]], "rope_theta": 1e6} | params


def _weight_files(storage: Storage) -> list[Path]:
    """One kind of file: where there are the weights twice, safetensors."""
    for pattern in ("consolidated*.safetensors", "consolidated.*.pth", "consolidated.*.pt"):
        if found := storage.glob(pattern):
            return found
    return []


def _union(files: list[Path], storage: Storage) -> dict[str, TensorInfo]:
    return union_of(
        {
            file: read_header(storage, file) if file.suffix == ".safetensors" else read_torch(file, storage)
            for file in files
        }
    )


def union_of(files: Mapping[Path, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """All tensors by name; several files may have one, if it has the same shape in all of them.

    Raises:
        CheckpointError: it has not.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, held in files.items():
        for name, info in unwrapped(held).items():
            if name in tensors and tensors[name].shape != info.shape:
                raise CheckpointError(
                    f"{file}: tensor {name!r} has shape {list(info.shape)}, in {tensors[name].file.name} "
                    f"{list(tensors[name].shape)}"
                )
            tensors[name] = info
    return tensors


def _apart(info: TensorInfo, config: MixtralConfig) -> TensorInfo:
    """Stacked experts as ``[E, out, in]``; any other tensor as it is."""
    stacked = re.search(r"block_sparse_moe\.(w[123])$", info.name)
    if stacked is None or config.is_dense:
        return info
    experts, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    if info.shape != (experts * width, hidden) or getattr(info, "transposed", False):
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; the configuration calls for "
            f"[{experts * width}, {hidden}], the rows of {experts} experts"
        )
    if stacked[1] != "w2":
        return replace(info, shape=(experts, width, hidden))
    return StoredTensor(
        info.name, info.file, info.dtype, (experts, hidden, width), info.offset, info.nbytes, transposed=True
    )


def _renamed(name: str) -> str:
    module, _, field = name.rpartition(".")
    if field in ("scales", "biases"):
        return f"{_renamed(f'{module}.weight').removesuffix('.weight')}.{field}"
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if (layer := _LAYER.fullmatch(name)) is None:
        return name
    rest = layer[2]
    expert = _EXPERT.fullmatch(rest)
    rest = f"block_sparse_moe.{expert[1]}" if expert else _IN_LAYER.get(rest, rest)
    return f"model.layers.{layer[1]}.{rest}"


def _native_name(name: str) -> str:
    for old, new in _OUTSIDE.items():
        if name == new:
            return old
    layer = _LAYER.fullmatch(name.removeprefix("model."))
    if layer is None:
        return name
    rest = _NATIVE.get(layer[2], layer[2].replace("block_sparse_moe.experts", "feed_forward.experts"))
    return f"layers.{layer[1]}.{rest}"
