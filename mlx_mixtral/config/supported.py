"""What a Hugging Face ``config.json`` may say that is not computed here, or that contradicts itself: errors name the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_mixtral.config.quantization import mlx_entry
from mlx_mixtral.errors import ConfigError

__all__ = ["ARCHITECTURES", "CONVERTIBLE_METHODS", "DEQUANTIZE", "refuse_contradiction", "refuse_unsupported", "shown"]

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
"""The class that ``architectures`` of config.json names, by ``model_type``."""
CONVERTIBLE_METHODS = ("awq", "gptq", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "bitsandbytes")
"""What ``quant_method`` says of weights that the converter reads."""
DEQUANTIZE = "use the unquantised original, or what transformers' model.dequantize() and save_pretrained() write"
"""What to do about weights of any other."""
# Keys that other models of this shape use to change the computation, with the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "clip_qkv": (),
    "use_alibi": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "first_k_dense_replace": (0,),
    "moe_layer_frequency": (1,),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "routed_scaling_factor": (1, 1.0),
    "vision_config": (),
    "text_config": (),
}


def refuse_contradiction(model_type: str, architectures: Any) -> None:
    """Raise ConfigError if the class named is another network than ``model_type``.

    Llama and Mistral are one network, and finetunes mix their names; classes for other tasks have other tensors anyway.
    """
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    wanted = ("mixtral",) if model_type == "mixtral" else ("mistral", "llama")
    causal = [name for name in names if name.endswith("ForCausalLM")]
    if causal and not any(word in name.lower() for name in causal for word in wanted):
        raise ConfigError(
            f"config.json: architectures says {shown(causal[0])}, model_type {model_type!r}, which are different networks; "
            "correct the one that is wrong"
        )


def refuse_unsupported(entries: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that changes the computation, and for weights packed in another way than MLX's."""
    for key, neutral in _NEUTRAL.items():
        value = entries.get(key)
        if value is not None and value not in neutral:
            raise ConfigError(f"config.json: {key} = {shown(value)} changes the computation and is not supported")
    foreign = entries.get("quantization_config")
    if isinstance(foreign, Mapping) and "quant_method" in foreign and mlx_entry(entries) is None:
        method = shown(foreign["quant_method"]).strip('"')
        fix = "convert them first, with mlx-mixtral convert" if method in CONVERTIBLE_METHODS else DEQUANTIZE
        raise ConfigError(f"config.json: weights are quantised with {method!r}; only MLX quantisation runs here: {fix}")


def shown(value: Any) -> str:
    """A value of a file in a message: as JSON, cut short."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
