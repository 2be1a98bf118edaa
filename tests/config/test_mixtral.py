"""The configuration against the reference implementation's own config classes, and every way a file can be wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConfigError
from tests.config.entries import MIXTRAL, PARAMS, SHAPE

transformers.logging.set_verbosity_error()

REFERENCE = {
    "mixtral": transformers.MixtralConfig,
    "mistral": transformers.MistralConfig,
    "llama": transformers.LlamaConfig,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 16.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0},
}


@st.composite
def rope_entries(draw: st.DrawFn) -> dict[str, Any]:
    """Some spelling of rope settings, as found on the hub: top-level, the older dict, the newer dict, or both."""
    entries: dict[str, Any] = {}
    if draw(st.booleans()):
        entries["rope_theta"] = draw(st.sampled_from([1e4, 5e5, 1000000, 1e6]))
    for key in ("rope_scaling", "rope_parameters"):
        if not draw(st.booleans()):
            continue
        kind = draw(st.sampled_from([None, "default", *SCALINGS]))
        if kind is None:
            entries[key] = None
            continue
        scaling = dict(SCALINGS.get(kind, {}))
        scaling[draw(st.sampled_from(["rope_type", "type"]))] = kind
        if draw(st.booleans()):
            scaling["rope_theta"] = draw(st.sampled_from([2e4, 3e6, 777777]))
        if kind in ("yarn", "llama3", "longrope") and draw(st.booleans()):
            scaling["original_max_position_embeddings"] = 64
        entries[key] = scaling
    if draw(st.booleans()):
        entries["original_max_position_embeddings"] = 32
    return entries


@st.composite
def hub_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of one of the three families with optional keys present, null or absent."""
    family = draw(st.sampled_from(sorted(REFERENCE)))
    entries = SHAPE | {"model_type": family} | draw(rope_entries())
    optional: dict[str, list[Any]] = {
        "num_key_value_heads": [1, 2, 4, 8],
        "head_dim": [None, 64, 128],
        "max_position_embeddings": [128, 32768],
        "rms_norm_eps": [1e-5, 1e-6, 0.001],
        "tie_word_embeddings": [True, False],
        "eos_token_id": [7, [7, 9, 7]],
        "bos_token_id": [3],
    }
    if family != "llama":
        optional["sliding_window"] = [None, 16, 4096]
    else:
        optional["num_key_value_heads"] = [None, 1, 4]
        optional["head_dim"] = [None, 64]
    if family == "mixtral":
        optional["num_experts_per_tok"] = [1, 2, 3]
        optional[draw(st.sampled_from(["num_local_experts", "num_experts"]))] = [4, 8, 16]
    for key, values in optional.items():
        if draw(st.booleans()):
            entries[key] = draw(st.sampled_from(values))
    for scaling in (entries.get("rope_scaling"), entries.get("rope_parameters")):
        if scaling and "short_factor" in scaling:
            pairs = (entries.get("head_dim") or 64) // 2
            scaling |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    return entries


@settings(max_examples=300, deadline=None)
@given(entries=hub_configs())
def test_every_spelling_is_read_as_transformers_reads_it(entries: dict[str, Any]) -> None:
    spelled = copy.deepcopy(entries)
    if spelled.get("head_dim") is None:
        spelled["head_dim"] = 512 // 8  # their check of longrope stumbles over a null
    theirs = REFERENCE[entries["model_type"]](**spelled)
    theirs.standardize_rope_params()  # the model calls it once more before it computes frequencies
    ours = MixtralConfig.from_hf(entries)

    assert ours.architecture == entries["model_type"]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    if ours.architecture == "mixtral":
        assert ours.num_local_experts == theirs.num_local_experts
        assert ours.num_experts_per_tok == theirs.num_experts_per_tok
    else:
        assert (ours.num_local_experts, ours.num_experts_per_tok) == (1, 1)
        assert ours.is_dense
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope["rope_theta"]
    assert ours.rope.kind == rope["rope_type"]
    if ours.rope.kind in ("yarn", "llama3", "longrope"):
        assert ours.rope.original == rope["original_max_position_embeddings"]
    assert ours.rope.parameters == {key: rope[key] for key in SCALINGS.get(ours.rope.kind, {})}
    if "eos_token_id" in entries:
        named = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
        assert set(ours.eos_token_ids) == set(named)


@pytest.mark.parametrize(
    ("family", "theta", "context", "kv_heads", "eps", "window"),
    [
        ("mixtral", 1e6, 131072, 8, 1e-5, None),
        ("mistral", 1e4, 131072, 8, 1e-6, 4096),
        ("llama", 1e4, 2048, 16, 1e-6, None),
    ],
)
def test_absent_keys_mean_what_each_family_says(
    family: str, theta: float, context: int, kv_heads: int, eps: float, window: int | None
) -> None:
    config = MixtralConfig.from_hf(SHAPE | {"model_type": family, "num_attention_heads": 16})
    assert config.rope.theta == theta
    assert config.rope.kind == "default"
    assert config.max_position_embeddings == context
    assert config.num_key_value_heads == kv_heads
    assert config.rms_norm_eps == eps
    assert config.sliding_window == window
    assert config.tie_word_embeddings is False
    assert config.head_dim == 32


def test_a_mixtral_without_expert_counts_has_eight_and_uses_two() -> None:
    config = MixtralConfig.from_hf(MIXTRAL)
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert not config.is_dense


def test_a_dense_model_ignores_expert_counts() -> None:
    config = MixtralConfig.from_hf(SHAPE | {"model_type": "mistral", "num_local_experts": 8, "num_experts_per_tok": 2})
    assert (config.num_local_experts, config.num_experts_per_tok) == (1, 1)


def test_use_sliding_window_false_and_null_turn_the_window_off() -> None:
    mistral = SHAPE | {"model_type": "mistral"}
    assert MixtralConfig.from_hf(mistral).sliding_window == 4096
    assert MixtralConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None
    assert MixtralConfig.from_hf(mistral | {"sliding_window": 8, "use_sliding_window": False}).sliding_window is None
    assert MixtralConfig.from_hf(mistral | {"sliding_window": 8, "use_sliding_window": True}).sliding_window == 8


def test_llama_has_no_window_whatever_its_file_says() -> None:
    # LlamaModel of transformers makes a plain causal mask.
    assert MixtralConfig.from_hf(SHAPE | {"model_type": "llama", "sliding_window": 4}).sliding_window is None


def test_layer_types_must_agree_with_the_window() -> None:
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    assert MixtralConfig.from_hf(MIXTRAL | {"layer_types": full}).sliding_window is None
    assert MixtralConfig.from_hf(MIXTRAL | {"layer_types": sliding, "sliding_window": 4}).sliding_window == 4
    assert MixtralConfig.from_hf(MIXTRAL | {"layer_types": None}).sliding_window is None
    for wrong in (
        {"layer_types": sliding},
        {"layer_types": full, "sliding_window": 4},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    ):
        with pytest.raises(ConfigError, match=r"layer_types .* contradicts sliding_window"):
            MixtralConfig.from_hf(MIXTRAL | wrong)


@pytest.mark.parametrize("value", [3, "full_attention", [["full_attention"]], [1], {"0": "full_attention"}])
def test_malformed_layer_types_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        MixtralConfig.from_hf(MIXTRAL | {"layer_types": value})


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "phimoe", "deepseek_v3", "gpt_oss", "Mixtral", "", None, 5, ["mixtral"], {"a": 1}]
)
def test_other_architectures_are_named_in_the_error(model_type: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        MixtralConfig.from_hf(SHAPE | {"model_type": model_type})
    assert repr(model_type) in str(caught.value)
    assert "llama, mistral, mixtral" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("mixtral", ["LlamaForCausalLM"]),
        ("mixtral", ["MistralForCausalLM"]),
        ("mistral", ["MixtralForCausalLM"]),
        ("llama", ["MixtralForCausalLM"]),
        ("llama", ["GemmaForCausalLM"]),
        ("mistral", ["Qwen2ForCausalLM", 5]),
    ],
)
def test_architectures_of_another_network_than_model_type_are_refused(
    model_type: str, architectures: list[Any]
) -> None:
    with pytest.raises(
        ConfigError, match=rf'architectures says "{architectures[0]}", model_type \'{model_type}\', which are different'
    ):
        MixtralConfig.from_hf(SHAPE | {"model_type": model_type, "architectures": architectures})


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("mixtral", ["MixtralForCausalLM"]),
        ("mixtral", ["QuantMixtralForCausalLM"]),
        ("mixtral", ["MixtralModel"]),
        ("mistral", ["MistralForSequenceClassification"]),
        ("mistral", ["LlamaForCausalLM"]),
        ("llama", ["MistralForCausalLM"]),
        ("llama", ["LLaMAForCausalLM"]),
        ("mixtral", []),
        ("mixtral", None),
        ("mixtral", "MixtralForCausalLM"),
    ],
)
def test_model_type_decides_where_architectures_does_not_contradict(model_type: str, architectures: Any) -> None:
    config = MixtralConfig.from_hf(SHAPE | {"model_type": model_type, "architectures": architectures})
    assert config.architecture == model_type


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("token", [64, 10**9])
def test_token_ids_beyond_the_vocabulary_are_refused(key: str, token: int) -> None:
    MixtralConfig.from_hf(MIXTRAL | {key: 63})
    for value in (token, [2, token]) if key == "eos_token_id" else (token,):
        with pytest.raises(ConfigError, match=rf"config: {key} is {token}; the vocabulary's ids go from 0 to 63 \(vo"):
            MixtralConfig.from_hf(MIXTRAL | {key: value})


def test_an_absent_model_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="None"):
        MixtralConfig.from_hf(SHAPE)


# A value that changes the computation, and the values (null aside) under which the key says nothing.
CHANGING: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("hidden_act", "gelu", ("silu", "swish")),
    ("partial_rotary_factor", 0.5, (1, 1.0)),
    ("rope_interleaved", True, (False,)),
    ("rope_traditional", True, (False,)),
    ("qk_norm", True, (False,)),
    ("use_qk_norm", True, (False,)),
    ("clip_qkv", 8.0, ()),
    ("use_alibi", True, (False,)),
    ("attn_logit_softcapping", 50.0, ()),
    ("final_logit_softcapping", 30.0, ()),
    ("logit_scale", 0.0625, (1, 1.0)),
    ("logits_scaling", 8, (1,)),
    ("embedding_multiplier", 12.0, (1.0,)),
    ("residual_multiplier", 0.22, (1.0,)),
    ("attention_multiplier", 0.0078125, ()),
    ("n_shared_experts", 1, (0,)),
    ("num_shared_experts", 2, (0,)),
    ("shared_expert_intermediate_size", 64, (0,)),
    ("first_k_dense_replace", 1, (0,)),
    ("moe_layer_frequency", 2, (1,)),
    ("decoder_sparse_step", 2, (1,)),
    ("norm_topk_prob", False, (True,)),
    ("scoring_func", "sigmoid", ("softmax",)),
    ("routed_scaling_factor", 2.5, (1.0,)),
    ("vision_config", {"depth": 2}, ()),
    ("text_config", {"hidden_size": 8}, ()),
]


@pytest.mark.parametrize(("key", "changing", "neutral"), CHANGING)
def test_a_key_that_changes_the_computation_is_refused_by_name(
    key: str, changing: Any, neutral: tuple[Any, ...]
) -> None:
    plain = MixtralConfig.from_hf(MIXTRAL)
    for value in (None, *neutral):
        assert MixtralConfig.from_hf(MIXTRAL | {key: value}) == plain
    with pytest.raises(ConfigError, match=f"{key} = .*changes the computation"):
        MixtralConfig.from_hf(MIXTRAL | {key: changing})


def test_a_long_unsupported_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        MixtralConfig.from_hf(MIXTRAL | {"vision_config": {"name": "x" * 5000}})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vocab_size", value) for value in (None, "512", 1.5, True, [512], {}, 0, -4, float("inf"), float("nan"))),
        *((key, -4) for key in SHAPE if key != "vocab_size"),
    ],
)
def test_malformed_sizes_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        MixtralConfig.from_hf(MIXTRAL | {key: value})


@pytest.mark.parametrize("key", [*SHAPE])
def test_absent_sizes_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        MixtralConfig.from_hf({name: value for name, value in MIXTRAL.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 0),
        ("num_key_value_heads", "8"),
        ("num_key_value_heads", 3),  # 8 heads do not divide over 3
        ("head_dim", 15),
        ("head_dim", "16"),
        ("num_local_experts", 0),
        ("num_local_experts", None),
        ("num_local_experts", 1),  # fewer than the two per token
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", None),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", None),
        ("max_position_embeddings", "32k"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 0),
        ("sliding_window", 0),
        ("sliding_window", "4096"),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("bos_token_id", "1"),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", [[2]]),
        ("eos_token_id", True),
    ],
)
def test_malformed_optional_values_are_refused(key: str, value: Any) -> None:
    words = "experts" if "experts" in key else "key-value heads|num_key_value_heads" if "value_heads" in key else key
    with pytest.raises(ConfigError, match=words):
        MixtralConfig.from_hf(MIXTRAL | {key: value})


def test_whole_floats_count_as_integers() -> None:
    config = MixtralConfig.from_hf(MIXTRAL | {"vocab_size": 64.0, "rope_theta": 1000000})
    assert config.vocab_size == 64
    assert isinstance(config.vocab_size, int)
    assert isinstance(config.rope.theta, float)


def test_heads_that_do_not_divide_the_hidden_size_need_head_dim() -> None:
    entries = MIXTRAL | {"hidden_size": 100, "num_attention_heads": 8}
    with pytest.raises(ConfigError, match="set head_dim"):
        MixtralConfig.from_hf(entries)
    assert MixtralConfig.from_hf(entries | {"head_dim": 32}).head_dim == 32


def test_foreign_quantisation_is_refused_with_its_method() -> None:
    for method in ("awq", "gptq", "fp8", "compressed-tensors"):
        with pytest.raises(ConfigError, match=method):
            MixtralConfig.from_hf(MIXTRAL | {"quantization_config": {"quant_method": method, "bits": 4}})


def test_mlx_quantisation_is_read_and_its_copy_for_other_loaders_ignored() -> None:
    entry = {"group_size": 64, "bits": 4, "lm_head": False, "model.embed_tokens": {"group_size": 32, "bits": 8}}
    config = MixtralConfig.from_hf(MIXTRAL | {"quantization": entry, "quantization_config": {"quant_method": "mlx"}})
    assert config.quantization is not None
    assert str(config.quantization.default) == "4-bit g64"
    assert config.quantization.for_module("lm_head") is None
    assert str(config.quantization.for_module("model.embed_tokens")) == "8-bit g32"
    assert MixtralConfig.from_hf(MIXTRAL).quantization is None


def test_the_source_is_kept_as_it_was_and_does_not_take_part_in_equality() -> None:
    config = MixtralConfig.from_hf(MIXTRAL | {"transformers_version": "4.36.0"})
    assert config.source == MIXTRAL | {"transformers_version": "4.36.0"}
    assert config == MixtralConfig.from_hf(MIXTRAL)


@pytest.mark.parametrize(("item_bytes", "per_token"), [(2, 131072), (4, 262144)])
def test_kv_bytes_of_8x7b_match_the_published_128_kib(item_bytes: int, per_token: int) -> None:
    assert MixtralConfig.from_params(PARAMS).kv_bytes_per_token(item_bytes) == per_token


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
READ_KEYS = [
    *SHAPE, "model_type", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "layer_types", "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization",
    "quantization_config", "original_max_position_embeddings", "architectures", *(key for key, _, _ in CHANGING),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(READ_KEYS), JSON, min_size=1, max_size=3))
def test_any_json_in_any_key_gives_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    try:
        config = MixtralConfig.from_hf(MIXTRAL | changes)
    except ConfigError as error:
        assert str(error)  # noqa: PT017
    else:
        assert config.head_dim >= 2
        assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.parametrize(
    ("key", "limit"),
    [
        ("num_hidden_layers", 1024), ("num_local_experts", 1024), ("vocab_size", 2**20), ("hidden_size", 2**15),
        ("intermediate_size", 2**18), ("head_dim", 1024), ("max_position_embeddings", 2**24), ("sliding_window", 2**24),
    ],
)  # fmt: skip
def test_impossible_counts_are_refused_before_anything_is_enumerated(key: str, limit: int) -> None:
    """A window of 2^40 overflows the int32 of a mask; a width of 2^24 asks for a tebibyte of hidden states."""
    assert MixtralConfig.from_hf({**MIXTRAL, "head_dim": 64, key: limit}).source[key] == limit
    for value in (limit + 1, 2**40, 10**400):
        with pytest.raises(
            ConfigError, match=rf"{key} is {str(value)[:100]}\d*; no model has more than {limit}|{key} is"
        ):
            MixtralConfig.from_hf({**MIXTRAL, "head_dim": 64, key: value})


def test_counts_that_are_possible_one_by_one_may_not_be_together() -> None:
    large = {"hidden_size": 2**15, "intermediate_size": 2**18, "num_local_experts": 1024, "head_dim": 128}
    with pytest.raises(ConfigError, match=r"the model has \d+ parameters; no model has more than"):
        MixtralConfig.from_hf(MIXTRAL | large)


@pytest.mark.parametrize("eps", [1.001, 1e30, 1e308])
def test_an_epsilon_that_drowns_everything_is_refused(eps: float) -> None:
    with pytest.raises(ConfigError, match=r"rms_norm_eps is .* at most 1"):
        MixtralConfig.from_hf(MIXTRAL | {"rms_norm_eps": eps})
