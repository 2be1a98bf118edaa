"""The model's configuration, read from Hugging Face ``config.json`` or Mistral's ``params.json``.

The published files differ in spelling (``rope_theta`` or ``rope_parameters``, ``head_dim`` null or set) and this module is
the only place that knows. What would change the maths and is not computed here is an error that names the key: a model that
runs and answers wrongly is worse than one that refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import is_integer, is_number
from mlx_mixtral.config.folder import must_convert, refuse_adapter, refuse_foreign
from mlx_mixtral.config.quantization import QuantizationConfig, mlx_entry
from mlx_mixtral.config.rope import EXTENDING_KINDS, MAX_CONTEXT_TOKENS, MAX_FACTOR, RopeConfig
from mlx_mixtral.config.supported import refuse_contradiction, refuse_unsupported, shown
from mlx_mixtral.errors import CheckpointError, ConfigError, ContextLengthError
from mlx_mixtral.reading import is_there, read_json

__all__ = ["MixtralConfig", "stop_ids"]

# model_type -> what transformers assumes for absent keys (configuration_{mixtral,mistral,llama}.py, transformers 5.23).
# A Mixtral without rope_theta means 1e6, never 1e4.
_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"rope_theta": 1e6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "mistral": {
        "rope_theta": 1e4,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "llama": {"rope_theta": 1e4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
}
# Counts from a stranger's file are bounded before anything is enumerated or allocated by them; real models are below, those
# of this family far below.
_MAX = {
    "hidden_size": 2**15, "intermediate_size": 2**18, "num_hidden_layers": 1024, "num_attention_heads": 1024,
    "num_key_value_heads": 1024, "head_dim": 1024, "vocab_size": 2**20, "num_local_experts": 1024,
    "num_experts_per_tok": 1024, "max_position_embeddings": MAX_CONTEXT_TOKENS,
    "sliding_window": MAX_CONTEXT_TOKENS,
}  # fmt: skip
_MAX_PARAMETERS = 2**43
_MAX_EPS = 1.0


@dataclass(frozen=True)
class MixtralConfig:
    """Shape and numerics of one decoder-only model of the Mixtral family (arXiv 2401.04088, table 1).

    ``architecture`` is ``mixtral``, or ``mistral`` / ``llama`` for a dense model: the same network with one expert and no
    router. Sizes are counts of features, heads, layers or tokens; ``sliding_window`` is None for full attention.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The file this was read from, as it was: what a conversion passes on."""

    def __post_init__(self) -> None:
        for name, limit in _MAX.items():
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if not is_integer(value) or value < 1:
                wanted = "null or at least 1" if name == "sliding_window" else "a positive integer"
                raise ConfigError(f"config: {name} is {value!r}; it must be {wanted}")
            if value > limit:
                raise ConfigError(f"config: {name} is {value}; no model has more than {limit}")
        if (count := self._parameters()) > _MAX_PARAMETERS:
            raise ConfigError(f"config: the model has {count} parameters; no model has more than {_MAX_PARAMETERS}")
        if not 0 < self.rms_norm_eps <= _MAX_EPS:
            raise ConfigError(
                f"config: rms_norm_eps is {self.rms_norm_eps!r}; it must be above 0 and at most {_MAX_EPS}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config: {self.num_attention_heads} attention heads do not divide over "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"config: num_experts_per_tok is {self.num_experts_per_tok}, more than the "
                f"{self.num_local_experts} experts there are"
            )
        if self.head_dim == 2 and self.rope.kind == "dynamic":
            raise ConfigError("config: head_dim is 2; dynamic rope scaling is not defined for heads that small")
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even number")
        self.rope.check(self.head_dim)
        _check_ids("config: bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,), self.vocab_size)
        _check_ids("config: eos_token_id", self.eos_token_ids, self.vocab_size)

    def _parameters(self) -> int:
        """Weights of all large matrices."""
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = self.hidden_size * (attention + 3 * self.num_local_experts * self.intermediate_size)
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size

    @property
    def is_dense(self) -> bool:
        """Whether the model has no router: one feed-forward network a layer."""
        return self.architecture != "mixtral"

    @property
    def max_context_tokens(self) -> int:
        """Tokens a sequence may have: ``max_position_embeddings``, or what rope scaling makes of it."""
        return max(self.max_position_embeddings, self.rope.max_context_tokens)

    def check_context(self, context: int) -> None:
        """Raise ContextLengthError for more tokens than a sequence may have."""
        own = self.max_context_tokens
        if context <= own:
            return
        kind = self.rope.kind if self.rope.kind in EXTENDING_KINDS else "yarn"
        factor = -(-context // self.rope.original)
        fix = "give no more"
        if factor <= MAX_FACTOR:
            fix += (
                f", or stretch it with --rope-scaling {kind}={factor} (rope_scaling= in Python) if you know that it "
                "supports this"
            )
        raise ContextLengthError(f"context is {shown(context)}; the model's own is {own} tokens: {fix}")

    def kv_bytes_per_token(self, item_bytes: int = 2) -> int:
        """Bytes of keys and values one token leaves in all layers, at ``item_bytes`` a number."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * item_bytes

    @classmethod
    def from_folder(cls, folder: Path) -> MixtralConfig:
        """Read ``config.json`` (and ``generation_config.json``'s stop ids), else ``params.json``, of a checkpoint folder.

        Raises:
            CheckpointError: the folder holds neither, or one that cannot be read.
            ConfigError: what is there cannot be run.
        """
        if is_there(folder / "config.json"):
            entries = read_json(folder / "config.json")
            if "dim" in entries and "hidden_size" not in entries:
                raise must_convert(folder, "the settings of MLX's first examples", "config.json")
            config, generation = cls.from_hf(entries), folder / "generation_config.json"
            if not is_there(generation):
                return config
            extra = stop_ids(read_json(generation), generation.name, config.vocab_size)
            return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))
        if is_there(folder / "params.json"):
            return cls.from_params(read_json(folder / "params.json"))
        refuse_adapter(folder)
        refuse_foreign((path.name for path in folder.glob("*") if path.is_file()), folder)
        raise CheckpointError(f"{folder} is not a checkpoint: it has neither config.json nor params.json")

    @classmethod
    def from_hf(cls, entries: Mapping[str, Any]) -> MixtralConfig:
        """Read the keys of a Hugging Face ``config.json``, old spellings and new.

        ``model_type`` decides, as for transformers and mlx-lm. vLLM and llama.cpp go by ``architectures``: a file that is
        another network to them is refused, for one of the two is wrong, and both may run.
        """
        architecture = entries.get("model_type")
        if not isinstance(architecture, str) or architecture not in _FAMILY:
            raise ConfigError(
                f"config.json describes a {architecture!r} model; this runtime computes {', '.join(sorted(_FAMILY))}"
            )
        family = _FAMILY[architecture]
        refuse_contradiction(architecture, entries.get("architectures"))
        refuse_unsupported(entries)
        get = _Reader(entries, "config.json")
        heads = get.integer("num_attention_heads")
        hidden = get.integer("hidden_size")
        kv_heads = get.optional_integer("num_key_value_heads", family.get("num_key_value_heads", heads))
        head_dim = get.optional_integer("head_dim", None)
        if head_dim is None and heads > 0:
            if hidden % heads:
                raise ConfigError(f"config.json: hidden_size {hidden} does not divide over {heads} heads; set head_dim")
            head_dim = hidden // heads
        mixture = architecture == "mixtral"
        experts = get.optional_integer("num_local_experts", get.optional_integer("num_experts", 8)) if mixture else 1
        context = get.optional_integer("max_position_embeddings", family["max_position_embeddings"])
        quantization = mlx_entry(entries)
        return cls(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_hidden_layers=get.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim or 0,
            vocab_size=get.integer("vocab_size"),
            num_local_experts=experts or 0,
            num_experts_per_tok=(get.optional_integer("num_experts_per_tok", 2) or 0) if mixture else 1,
            rms_norm_eps=get.number("rms_norm_eps", family["rms_norm_eps"]),
            max_position_embeddings=context or 0,
            rope=RopeConfig.from_hf(entries, family["rope_theta"], context or 0),
            sliding_window=_sliding_window(entries, get, family.get("sliding_window")),
            tie_word_embeddings=get.flag("tie_word_embeddings"),
            bos_token_id=get.optional_integer("bos_token_id", None),
            eos_token_ids=_token_ids(entries.get("eos_token_id"), "config"),
            quantization=None if quantization is None else QuantizationConfig.from_dict(quantization),
            source=dict(entries),
        )

    @classmethod
    def from_params(cls, entries: Mapping[str, Any]) -> MixtralConfig:
        """Read Mistral's ``params.json`` (``dim``, ``n_layers``, ``moe`` …); an absent ``rope_theta`` means 1e6."""
        known = {
            "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "moe",
            "rope_theta", "sliding_window", "max_seq_len", "max_position_embeddings", "max_batch_size",
            "tied_embeddings", "model_type", "use_biases", "ffn_dim_multiplier", "multiple_of", "dtype",
        }  # fmt: skip
        if unknown := sorted(set(entries) - known):
            raise ConfigError(f"params.json: {unknown[0]!r} is not supported ({entries[unknown[0]]!r})")
        for key in ("use_biases", "ffn_dim_multiplier", "sliding_window"):
            if key != "sliding_window" and entries.get(key):
                raise ConfigError(f"params.json: {key} = {entries[key]!r} is not supported")
        get = _Reader(entries, "params.json")
        moe = entries.get("moe")
        if moe is not None and not isinstance(moe, Mapping):
            raise ConfigError(f"params.json: moe is {moe!r}, not an object")
        mixture = _Reader(moe, "params.json: moe") if moe is not None else None
        heads = get.integer("n_heads")
        context = get.optional_integer("max_seq_len", get.optional_integer("max_position_embeddings", 32768)) or 0
        theta = get.number("rope_theta", 1e6)
        head_dim = get.optional_integer("head_dim", None)
        if head_dim is None and heads > 0 and get.integer("dim") % heads:
            raise ConfigError(f"params.json: dim {get.integer('dim')} does not divide over {heads} heads; set head_dim")
        return cls(
            architecture="mistral" if mixture is None else "mixtral",
            hidden_size=get.integer("dim"),
            intermediate_size=get.integer("hidden_dim"),
            num_hidden_layers=get.integer("n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=get.optional_integer("n_kv_heads", heads) or 0,
            head_dim=get.integer("dim") // max(heads, 1) if head_dim is None else head_dim,
            vocab_size=get.integer("vocab_size"),
            num_local_experts=1 if mixture is None else mixture.integer("num_experts"),
            num_experts_per_tok=1 if mixture is None else mixture.integer("num_experts_per_tok"),
            rms_norm_eps=get.number("norm_eps", 1e-5),
            max_position_embeddings=context,
            rope=RopeConfig(theta=theta, max_position_embeddings=context),
            sliding_window=get.optional_integer("sliding_window", None),
            tie_word_embeddings=get.flag("tied_embeddings"),
            bos_token_id=1,
            eos_token_ids=(2,),
            source=dict(entries),
        )


class _Reader:
    """Typed look-ups in a parsed JSON object that name the file and the key when they fail."""

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self.entries, self.where = entries, where

    def integer(self, key: str) -> int:
        value = self.optional_integer(key, None)
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return value

    def optional_integer(self, key: str, default: int | None) -> int | None:
        value = self.entries.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and not is_integer(value):
            raise ConfigError(f"{self.where}: {key} is {value!r}, not an integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.entries.get(key, default)
        if not is_number(value) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self.where}: {key} is {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.entries.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}, not true or false")
        return bool(value)


def _sliding_window(entries: Mapping[str, Any], get: _Reader, default: int | None) -> int | None:
    """The window, None for full attention; ``layer_types`` must agree with it on every layer."""
    window = get.optional_integer("sliding_window", default)
    # Llama has none: transformers and mlx-lm pass over a window in its file.
    if entries.get("use_sliding_window") is False or entries.get("model_type") == "llama":
        window = None
    listed_kinds = entries.get("layer_types") or []
    if not isinstance(listed_kinds, list) or not all(isinstance(kind, str) for kind in listed_kinds):
        raise ConfigError(f"config.json: layer_types is {shown(listed_kinds)}, not a list of names")
    kinds = set(listed_kinds)
    if kinds and kinds != {"full_attention" if window is None else "sliding_attention"}:
        listed = ", ".join(sorted(kinds))
        raise ConfigError(f"config.json: layer_types ({listed}) contradicts sliding_window = {window}; make them agree")
    return window


def stop_ids(entries: Mapping[str, Any], where: str, vocab_size: int) -> tuple[int, ...]:
    """``eos_token_id`` of ``generation_config.json``: one id, several or none.

    Raises:
        ConfigError: an id that is not in the vocabulary.
    """
    found = _token_ids(entries.get("eos_token_id"), where)
    _check_ids(f"{where}: eos_token_id", found, vocab_size)
    return found


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if not is_integer(token) or token < 0:
            raise ConfigError(f"{where}: eos_token_id holds {shown(token)}, not a token id")
    return tuple(dict.fromkeys(values))


def _check_ids(what: str, ids: tuple[int, ...], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{what} is {token}; the vocabulary's ids go from 0 to {vocab_size - 1} (vocab_size): write the id that this "
                "model was trained with there, or take the entry out, and the tokenizer's own counts"
            )
