"""A loaded model in one line."""

from __future__ import annotations

from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.sizes import format_bytes

__all__ = ["described"]


def described(engine: Engine) -> str:
    """Its layers and experts, what of it is in memory here, on what device, and which machine of a group this is."""
    if engine.is_closed:
        return "<Mixtral: closed>"
    config, plan = engine.config, engine.plan
    experts = "dense"
    if not config.is_dense:
        experts = f"{config.num_local_experts} experts, {config.num_experts_per_tok} per token"
    memory = f"{format_bytes(engine.residency.resident_bytes)} of weights in memory"
    if plan.residency is not None:
        memory += ", other experts streamed"
    place = engine.device.name
    if engine.link is not None:
        place += f"; rank {engine.link.group.rank} of {engine.link.group.size}, split by {engine.link.share.split}"
    return f"<Mixtral: {config.num_hidden_layers} layers, {experts}; {memory}; {place}>"
