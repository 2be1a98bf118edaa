"""``info 8x7b``: what a published Mixtral weighs at each bit width, which Macs it fits, how fast their memory lets it be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides
from mlx_mixtral.info.estimate import (
    BUILT_IN,
    WIDTHS,
    WORKING_BYTES,
    bytes_by_part,
    bytes_per_token,
    context_that_fits,
    expert_bytes,
    parameters,
)
from mlx_mixtral.info.macs import MAC_MEMORY_GIB, MEASURED_8X7B, USABLE_NOTE, Chip, usable_bytes
from mlx_mixtral.info.recipes import recipes_for
from mlx_mixtral.sizes import format_bytes

__all__ = ["FITS_NOTE", "facts_of", "kv_cache", "limits", "shape_report"]

FITS_NOTE = f"{USABLE_NOTE}, less {format_bytes(WORKING_BYTES)} to work in."


def shape_report(name: str, chips: Sequence[Chip], overrides: ConfigOverrides | None = None) -> dict[str, Any]:
    """All that ``info 8x7b`` shows, as ``--json`` prints it."""
    config = (overrides or ConfigOverrides()).apply(BUILT_IN[name])
    widths: list[dict[str, Any]] = []
    for width in WIDTHS:
        parts = bytes_by_part(config, width)
        widths.append(
            {
                "bits": width.bits or 16,
                "bytes": sum(parts.values()),
                "parts": parts,
                "expert_bytes": expert_bytes(config, width),
                "bytes_per_token": bytes_per_token(config, parts),
            }
        )
    return {
        "model": name,
        **facts_of(config),
        "widths": widths,
        "kv_cache": kv_cache(config),
        **limits(config, {f"{w['bits']}-bit": (w["bytes"], w["bytes_per_token"]) for w in widths}, chips),
        "recipes": recipes_for(config, chips),
        "measured": [asdict(entry) for entry in MEASURED_8X7B] if name == "8x7b" else [],
    }


def facts_of(config: MixtralConfig) -> dict[str, Any]:
    """The shape in the field's own names."""
    total, active = parameters(config)
    return {
        "architecture": config.architecture,
        "parameters": total,
        "active_parameters": active,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "context": config.max_context_tokens,
        "sliding_window": config.sliding_window,
    }


def kv_cache(config: MixtralConfig) -> dict[str, Any]:
    """Bytes of the 16-bit KV cache, a token and at whole contexts."""
    each, longest = config.kv_bytes_per_token(), config.max_context_tokens
    contexts = sorted({count for count in (4096, 8192, 16384, 32768, 65536) if count <= longest} or {longest})
    return {"bytes_per_token": each, "bytes_by_context": {str(count): count * each for count in contexts}}


def limits(
    config: MixtralConfig, variants: Mapping[str, tuple[int, int]], chips: Sequence[Chip]
) -> dict[str, list[dict[str, Any]]]:
    """What fits which Mac, and how fast its memory lets it be: ``variants`` name (bytes, bytes read per token)."""
    return {
        "fits": [
            {
                "memory_gib": memory,
                "usable_bytes": usable_bytes(memory),
                "context": {
                    name: context_that_fits(config, weights, usable_bytes(memory))
                    for name, (weights, _) in variants.items()
                },
            }
            for memory in MAC_MEMORY_GIB
        ],
        "speed_bounds": [
            {
                "chip": chip.name,
                "bandwidth_gb_s": chip.bandwidth_gb_s,
                "tok_s": {name: chip.bandwidth_gb_s * 1e9 / read for name, (_, read) in variants.items()},
            }
            for chip in chips
        ],
    }
