"""The head of a GGUF file, written by the ``gguf`` package: what the model is, its vocabulary, and where each tensor lies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.rope import RopeConfig
from mlx_mixtral.errors import ConfigError
from mlx_mixtral.files import disk_errors
from mlx_mixtral_convert.export.gguf_vocabulary import Vocabulary
from mlx_mixtral_convert.sources.gguf.types import GgufTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["rope_factors", "write_header"]


def write_header(
    path: Path, name: str, config: MixtralConfig, vocabulary: Vocabulary, kind: str, tensors: Sequence[GgufTensor]
) -> None:
    """Write everything before the first tensor's data.

    Raises:
        DiskSpaceError: the disk is full.
        DestinationError: any other failure to write.
    """
    import gguf

    with disk_errors(path), contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_type("model")
        writer.add_name(name)
        _add_model(writer, config)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            # Any numpy type but uint8, which stands for a shape in bytes.
            raw = gguf.GGMLQuantizationType[tensor.kind.name]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def rope_factors(config: MixtralConfig) -> npt.NDArray[np.float32] | None:
    """What each rotary frequency is divided by, ``[head_dim / 2]``, for scaling that has no keys in GGUF; else None.

    Raises:
        ConfigError: scaling that depends on the length of the text or changes the scores' scale.
    """
    rope = config.rope
    if rope.kind in ("default", "linear", "yarn"):
        _refuse_tuned_yarn(rope)
        return None
    if rope.kind == "longrope" and not _has_one_scale(rope):
        raise ConfigError(
            "rope scaling 'longrope' with different factors past a certain length cannot be written to GGUF"
        )
    if rope.kind not in ("llama3", "longrope"):
        raise ConfigError(f"rope scaling {rope.kind!r} cannot be written to GGUF; default, linear, yarn and llama3 can")
    scaled = rope.inverse_frequencies(config.head_dim, 1)
    if rope.kind == "longrope":
        return np.asarray((rope.parameters or {})["long_factor"], np.float32)
    return RopeConfig(rope.theta, rope.max_position_embeddings).inverse_frequencies(config.head_dim, 1) / scaled


def _has_one_scale(rope: RopeConfig) -> bool:
    """Whether longrope's divisors are the same at every length, as those read from GGUF are."""
    given = rope.parameters or {}
    return given["long_factor"] == given["short_factor"] and rope.attention_factor() == 1


def _refuse_tuned_yarn(rope: RopeConfig) -> None:
    """llama.cpp computes yarn with the constants of the paper (arXiv 2309.00071), whatever the file says."""
    given = rope.parameters or {}
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    tuned = [key for key, value in usual.items() if given.get(key) not in (None, value)]
    if rope.kind == "yarn" and not tuned:
        expected = 1 + 0.1 * math.log(given["factor"])
        tuned = ["attention_factor"] if abs(rope.attention_factor() - expected) > 1e-6 else []
    if tuned:
        raise ConfigError(f"rope scaling 'yarn' with a custom {tuned[0]} cannot be written to GGUF")


def _add_model(writer: GGUFWriter, config: MixtralConfig) -> None:
    # Within its window a model with sliding-window attention computes what one with full attention does.
    context = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind in ("linear", "yarn"):
        _add_rope_scaling(writer, config.rope)
    if not config.is_dense:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _add_rope_scaling(writer: GGUFWriter, rope: RopeConfig) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
    writer.add_rope_scaling_factor(float((rope.parameters or {})["factor"]))
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    for token_id, add in (
        (vocabulary.bos, writer.add_bos_token_id),
        (vocabulary.eos, writer.add_eos_token_id),
        (vocabulary.unknown, writer.add_unk_token_id),
        (vocabulary.pad, writer.add_pad_token_id),
        (vocabulary.eot, writer.add_eot_token_id),
        (vocabulary.eom, writer.add_eom_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.templates:
        named = sorted(vocabulary.templates.items())
        writer.add_chat_template([{"name": name, "template": source} for name, source in named])
