"""A configuration with values that a formula or an allocation would meet later, all else as it was."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["bend_config"]

COUNTS = (0, 1, 2, 3, 2**10, 2**15, 2**20, 2**24, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 1.0, 1e9)
NUMBERS = (
    0.0, 1e-308, 1e-30, 1e-6, 0.5, 1.0, 1.0000001, 2.0, 40.0, 1e6, 1e12, 1e13, 1e30, 1e38, 1e300, 1e308, float("inf"),
    float("nan"), -1.0,
)  # fmt: skip
KEYS: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None, *COUNTS),
    "max_position_embeddings": COUNTS,
    "original_max_position_embeddings": COUNTS,
    "rope_theta": NUMBERS,
    "rms_norm_eps": NUMBERS,
    "num_experts_per_tok": COUNTS,
    "num_local_experts": COUNTS,
    "num_hidden_layers": COUNTS,
    "hidden_size": COUNTS,
    "intermediate_size": COUNTS,
    "head_dim": COUNTS,
    "num_attention_heads": COUNTS,
    "num_key_value_heads": COUNTS,
    "vocab_size": COUNTS,
    "eos_token_id": (*COUNTS, [1] * 100_000, list(range(32))),
    "bos_token_id": COUNTS,
    "tie_word_embeddings": (True,),
    "layer_types": (["sliding_attention"] * 100_000, ["full_attention"]),
    "torch_dtype": ("float64", "x" * 60_000),
    "architectures": (["x" * 60_000 + "ForCausalLM"], ["MistralForCausalLM"]),
    "quantization": ({"bits": 4, "group_size": 64}, {f"m{i}": False for i in range(10_000)} | {"bits": 4}),
}
SCALING_KEYS = (
    "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "rope_theta",
)  # fmt: skip
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("long_factor", "short_factor"),
}


def bend_config(rng: random.Random, data: bytes) -> bytes:
    """``data``, a config.json, with one to three changes."""
    entries = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            key = rng.choice(sorted(KEYS))
            entries[key] = rng.choice(KEYS[key])
        else:
            entries["rope_scaling"] = _scaling(rng, entries)
    return json.dumps(entries).encode()


def _scaling(rng: random.Random, entries: dict[str, Any]) -> dict[str, Any]:
    kind = rng.choice(sorted(SCALINGS))
    made: dict[str, Any] = {"rope_type": kind}
    for key in SCALINGS[kind]:
        if key in ("long_factor", "short_factor"):
            made[key] = [rng.choice((1.0, 2.0, rng.choice(NUMBERS))) for _ in range(rng.choice((16, 16, 1)))]
        else:
            made[key] = rng.choice((1.0, 4.0, rng.choice(NUMBERS)))
    if rng.random() < 0.5:
        made[rng.choice(SCALING_KEYS)] = rng.choice(NUMBERS)
    return made
