"""GGUF's ``llama.*`` keys as the entries of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import is_integer, is_number
from mlx_mixtral.config.supported import ARCHITECTURES
from mlx_mixtral.errors import ConfigError
from mlx_mixtral_convert.sources.gguf.header import GgufHeader
from mlx_mixtral_convert.sources.gguf.rope import scaling_of_factors

__all__ = ["hf_entries"]

# Keys read below, or that describe and do not compute.
_KNOWN = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count",
    "expert_used_count", "vocab_size", "tensor_data_layout", "expert_feed_forward_length",
    "rope.scaling.attn_factor",
}  # fmt: skip
# Any other key of the architecture changes the computation, unless it says so much as "not that".
_NEUTRAL = (0, 0.0, False, "")
_PREFIX = "llama."


def hf_entries(
    header: GgufHeader,
    vocab_size: int,
    *,
    tied: bool,
    rope_tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> dict[str, Any]:
    """The configuration a file's keys describe: ``mixtral`` with experts, else ``llama``, or ``mistral`` with a window.

    Args:
        vocab_size: rows of the embedding.
        tied: the file has no output matrix.
        rope_tensors: those of ``ROPE_TENSORS`` that the file has, by name.

    Raises:
        ConfigError: another architecture, a key that is missing or malformed, or one that changes the computation.
    """
    keys, get = header.keys, _Keys(header)
    architecture = keys.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{header.path} holds a {architecture!r} model; Mixtral, Mistral and Llama files say 'llama' "
            "at general.architecture"
        )
    if (kind := keys.get("general.type", "model")) != "model":
        raise ConfigError(f"{header.path} holds a {kind!r}, not a model")
    if not rope_tensors and keys.get(f"{_PREFIX}rope.scaling.attn_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{header.path}: {_PREFIX}rope.scaling.attn_factor without longrope's tensors is not supported"
        )
    for key, value in keys.items():
        name = key.removeprefix(_PREFIX)
        if name != key and name not in _KNOWN and value not in _NEUTRAL:
            raise ConfigError(f"{header.path}: {key!r} = {_short(value)} changes the computation and is not supported")
    experts, heads = get.integer("expert_count", 0), get.integer("attention.head_count")
    hidden, context = get.integer("embedding_length"), get.integer("context_length")
    head_dim = get.integer("attention.key_length", hidden // max(heads, 1))
    for other in ("attention.value_length", "rope.dimension_count"):
        if (length := get.integer(other, head_dim)) != head_dim:
            raise ConfigError(
                f"{header.path}: {_PREFIX}{other} is {length}, which differs from the head size {head_dim}"
            )
    width = get.integer("feed_forward_length")
    window = get.integer("attention.sliding_window", 0)
    dense = "mistral" if window else "llama"
    entries: dict[str, Any] = {
        "architectures": [ARCHITECTURES[dense]],
        "model_type": dense,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": get.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "rms_norm_eps": _shortest(get.number("attention.layer_norm_rms_epsilon")),
        # What llama.cpp takes for a dense file that says nothing. A Mixtral's is never 1e4.
        "rope_theta": _shortest(get.number("rope.freq_base", 1e6 if experts else 1e4)),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    if experts:
        entries |= {
            "architectures": [ARCHITECTURES["mixtral"]],
            "model_type": "mixtral",
            "intermediate_size": get.integer("expert_feed_forward_length", 0) or width,
            "num_local_experts": experts,
            "num_experts_per_tok": get.integer("expert_used_count", 2),
        }
    if window:
        entries["sliding_window"] = window
    scaling = _declared_scaling(get, header, with_tensors=bool(rope_tensors))
    if rope_tensors:
        attention = get.number("rope.scaling.attn_factor", 1.0)
        try:
            scaling = scaling_of_factors(scaling, rope_tensors, entries["rope_theta"], context, _shortest(attention))
        except ConfigError as error:
            raise ConfigError(f"{header.path}: {error}") from error
    if scaling:
        entries["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        if isinstance(token := keys.get(f"tokenizer.ggml.{name}_token_id"), int):
            entries[f"{name}_token_id"] = token
    # What llama.cpp ends a text at too: the end of a turn and of a message.
    ends = [keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    valid = [token for token in ends if is_integer(token) and 0 <= token < entries["vocab_size"]]
    if len(set(valid)) > 1:
        entries["eos_token_id"] = list(dict.fromkeys(valid))
    return entries


def _declared_scaling(get: _Keys, header: GgufHeader, *, with_tensors: bool) -> Mapping[str, Any] | None:
    """What the keys say; longrope's divisors are in tensors."""
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    # A factor without a kind is linear.
    kind = header.keys.get(f"{_PREFIX}rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(factor)}
    original = get.integer("rope.scaling.original_context_length", 0)
    given = {"original_max_position_embeddings": original} if original else {}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": _shortest(factor), **given}
    if kind == "longrope" and with_tensors:
        return {"rope_type": "longrope", **given}
    raise ConfigError(f"{header.path}: {_PREFIX}rope.scaling.type = {kind!r} is not supported; linear and yarn are")


class _Keys:
    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        # One value a layer, all alike.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if not is_integer(value):
            raise ConfigError(f"{self._header.path}: {_PREFIX}{name} is {_short(value)}, not one integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not is_number(value):
            raise ConfigError(f"{self._header.path}: {_PREFIX}{name} is {_short(value)}, not a number")
        return float(value)

    def _value(self, name: str, default: Any) -> Any:
        value = self._header.keys.get(f"{_PREFIX}{name}", default)
        if value is None:
            raise ConfigError(f"{self._header.path}: the key {_PREFIX}{name} is missing")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32, which is what the file holds: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
