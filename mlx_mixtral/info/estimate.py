"""What a Mixtral weighs and needs, computed from its shape alone: parameters, bytes by part and bit width, KV cache, fit."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec

__all__ = [
    "BUILT_IN",
    "PARTS",
    "PART_NAMES",
    "WIDTHS",
    "WORKING_BYTES",
    "Width",
    "bytes_by_part",
    "bytes_packed",
    "bytes_per_token",
    "context_that_fits",
    "expert_bytes",
    "parameters",
]

PARTS = ("embedding", "attention", "router", "expert", "head", "norms")
PART_NAMES = {part: part for part in PARTS} | {"expert": "experts", "norm": "norms"}
"""Of parts as they are shown; the converter has a part ``norm``."""

# The published config.json of mistralai/Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1.
_SHARED = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 32000,
}
BUILT_IN = {
    "8x7b": MixtralConfig.from_hf(
        _SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 32768,
        }
    ),
    "8x22b": MixtralConfig.from_hf(
        _SHARED
        | {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "max_position_embeddings": 65536,
        }
    ),
}

# Activations of one 1024-token chunk of the prompt and MLX's own buffers, rounded up.
WORKING_BYTES = 500_000_000


@dataclass(frozen=True)
class Width:
    """A bit width as users choose it: ``--bits``; None is 16 bits, unquantised. Groups of 64; the router stays in 16."""

    bits: int | None

    @property
    def name(self) -> str:
        return f"{self.bits or 16}-bit"

    @property
    def spec(self) -> QuantizationSpec | None:
        return None if self.bits is None else QuantizationSpec.make(self.bits)


WIDTHS = tuple(Width(bits) for bits in (2, 3, 4, 5, 6, 8, None))


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """Parameters in all, and those that take part in one token (the chosen experts only)."""
    total = sum(matrix.parameters for matrix in matrices(config)) + sum(norm.size for norm in norms(config))
    experts = sum(matrix.parameters for matrix in matrices(config) if matrix.part == "expert")
    idle = config.num_local_experts - config.num_experts_per_tok
    return total, total - experts * idle // config.num_local_experts


def bytes_by_part(config: MixtralConfig, width: Width) -> dict[str, int]:
    """Bytes of each part, scales and biases included; router and norms in 16 bits."""
    return bytes_packed(config, width.spec)


def bytes_packed(config: MixtralConfig, spec: QuantizationSpec | None) -> dict[str, int]:
    """As ``bytes_by_part``, with every matrix but the router in ``spec``; None is 16 bits."""
    sizes = dict.fromkeys(PARTS, 0)
    for matrix in matrices(config):
        rows = matrix.parameters // matrix.in_features
        if spec is None or matrix.part == "router":
            sizes[matrix.part] += 2 * matrix.parameters
        else:
            sizes[matrix.part] += spec.nbytes(rows, matrix.in_features)
    sizes["norms"] = sum(2 * norm.size for norm in norms(config))
    return sizes


def expert_bytes(config: MixtralConfig, width: Width) -> int:
    """Bytes of one expert of one layer."""
    return bytes_by_part(config, width)["expert"] // (config.num_local_experts * config.num_hidden_layers)


def bytes_per_token(config: MixtralConfig, sizes: dict[str, int]) -> int:
    """Bytes of weights read to generate one token: one row of the embedding, the chosen experts, all of the rest."""
    row = sizes["embedding"] // config.vocab_size
    chosen = sizes["expert"] * config.num_experts_per_tok // config.num_local_experts
    # A tied embedding is the output head as well, and read whole there.
    head = sizes["embedding"] if config.tie_word_embeddings else sizes["head"]
    return row + chosen + sizes["attention"] + sizes["router"] + sizes["norms"] + head


def context_that_fits(config: MixtralConfig, weight_bytes: int, memory_bytes: int) -> int:
    """Tokens of context whose 16-bit KV cache fits beside the weights, at most the model's own; 0 when not even 1024 do."""
    room = memory_bytes - weight_bytes - WORKING_BYTES
    tokens = min(max(room, 0) // config.kv_bytes_per_token(), config.max_context_tokens)
    return tokens if tokens >= 1024 else 0
