"""Tensors that a model is not read from: what may be left out of it, and what may not.

A model that leaves weights out would run and answer wrongly. Some tools write biases of zeros, scales for a cache that is not
quantised here, or frequencies that follow from the configuration; these change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import FIELDS
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["bias_notes", "is_zero", "refuse_unused", "unused_tensors"]

# Small tensors, which come one at a time from a hub.
THREADS = 8
_SIGNLESS = 0x7FFF
# Old checkpoints store the rotary frequencies, which follow from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Scales for keys and values (and queries, and probabilities) in 8 or 4 bits, under all names in use: the attention's own,
# those of a module in it (attn, k_proj, a fused qkv_proj), AMD's output scales, ModelOpt's quantisers.
_CACHE_SCALE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(?:\w+\.)*"
    r"(?:(?:[qkv]|kv|qkv|p|prob|softmax|attn)(?:_proj|_cache|_output)*_(?:scale|scale_inv|zero_point|global_scale|amax)"
    r"|(?:[qkv]|kv|softmax)_bmm_quantizer\.\w+|output_scale|output_zero_point)"
)


def unused_tensors(checkpoint: Checkpoint, used: Collection[str], config: MixtralConfig) -> dict[str, TensorInfo]:
    """All tensors of the weight files that are not among ``used``, in order of name: also those the index does not name.

    An output matrix beside tied embeddings is not counted, for it is theirs.
    """
    tied = {f"lm_head.{field}" for field in FIELDS} if config.tie_word_embeddings else set()
    present = {**checkpoint.unnamed, **checkpoint}
    return {name: present[name] for name in sorted(present) if name not in used and name not in tied}


def refuse_unused(unused: Mapping[str, TensorInfo], reader: CheckpointReader) -> tuple[str, ...]:
    """What to say of tensors that may be left out.

    Raises:
        CheckpointError: one of them may not.
    """
    zeros = _refuse_biases(unused, reader)
    scales = [name for name in unused if _CACHE_SCALE.fullmatch(name)]
    harmless = {*zeros, *scales}
    for name, info in unused.items():
        if name not in harmless and not _DERIVED.fullmatch(name):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has no place in the model config.json describes; "
                "check num_hidden_layers, num_local_experts and model_type"
            )
    notes = bias_notes(zeros)
    if scales:
        notes += (
            f"{len(scales)} scales for a quantised KV cache ({scales[0]!r} is the first) are left out: here the cache "
            "chooses its own, with --kv-bits",
        )
    return notes


def _refuse_biases(unused: Mapping[str, TensorInfo], reader: CheckpointReader) -> list[str]:
    def check(info: TensorInfo) -> None:
        if info.dtype not in FLOATS or not is_zero(as_numpy(reader.rows(info, 0, info.rows), info.dtype), info.dtype):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} is a bias that is not zero; the model computed here has no place for it"
            )

    found = [name for name in unused if name.endswith(".bias")]
    if found:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
            list(pool.map(check, (unused[name] for name in found)))
    return found


def is_zero(values: npt.NDArray[Any], dtype: str) -> bool:
    """Whether all values of a safetensors float type are 0 or -0."""
    return not (values & np.uint16(_SIGNLESS) if dtype == "BF16" else values).any()


def bias_notes(names: list[str]) -> tuple[str, ...]:
    """What to say of biases that are left out."""
    if not names:
        return ()
    count = "1 bias of zeros is" if len(names) == 1 else f"{len(names)} biases of zeros are"
    return (f"{count} left out, as {names[0]}",)
