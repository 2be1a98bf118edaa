"""How a model is split over several machines: what each one holds, and what a token reads. Arithmetic only.

    layers    a run of whole layers on each machine; a token passes through one machine after another
    experts   a slice of every expert's width on each machine, attention on all; one sum of all machines in each layer

The shares are those that a checkpoint is loaded with (``distributed.shares``), the seconds of a token those of
``distributed.cost``. Layers are taken as equally large: a conversion may give them other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.cost import TokenBytes
from mlx_mixtral.distributed.shares import MIN_GROUP, Share, expert_shares, layer_shares
from mlx_mixtral.info.estimate import bytes_per_token

__all__ = ["BANDWIDTH_SHARE", "SPLITS", "Held", "ModelParts", "decoding_rate", "token_bytes"]

BANDWIDTH_SHARE = 0.75
"""Of a chip's published bandwidth: what decoding is assumed to reach."""


def decoding_rate(bandwidth_gb_s: float) -> float:
    """Bytes of weights a second that decoding is assumed to read, of a published bandwidth in GB/s."""
    return BANDWIDTH_SHARE * bandwidth_gb_s * 1e9


@dataclass(frozen=True)
class ModelParts:
    """A model as far as planning knows it.

    Args:
        parts: bytes of each part, as ``estimate.bytes_by_part`` names them.
        group_size: of the experts' quantisation; None where they have none.
    """

    config: MixtralConfig
    parts: Mapping[str, int]
    group_size: int | None

    @property
    def trunk_bytes(self) -> int:
        """All but the experts."""
        return sum(self.parts.values()) - self.parts["expert"]


@dataclass(frozen=True)
class Held:
    """What one machine holds: the configuration of its part, and bytes of its trunk and of its experts."""

    config: MixtralConfig
    trunk_bytes: int
    expert_bytes: int


def token_bytes(model: ModelParts) -> TokenBytes:
    """Bytes of weights that one token reads."""
    config = model.config
    experts = model.parts["expert"] * config.num_experts_per_tok // config.num_local_experts
    return TokenBytes(bytes_per_token(config, dict(model.parts)) - experts, experts)


def _layer_shares(model: ModelParts, usable: Sequence[int]) -> list[Held]:
    """What each machine holds with layers split."""
    config, parts, layers = model.config, model.parts, model.config.num_hidden_layers
    norms = parts["norms"] * 2 * layers // (2 * layers + 1)  # all but the last one
    trunk, experts = (parts["attention"] + parts["router"] + norms) // layers, parts["expert"] // layers
    leader = sum(parts.values()) - layers * (trunk + experts)

    def held(share: Share) -> Held:
        count = len(share.layers)
        return Held(share.part_of(config), count * trunk + (leader if share.is_leader else 0), count * experts)

    sizes = [trunk + experts] * layers
    return [held(share) for share in layer_shares(config, usable, layer_bytes=sizes, leader_bytes=leader)]


def _expert_shares(model: ModelParts, usable: Sequence[int]) -> list[Held]:
    """The same with experts split: whole quantisation groups of their width; the head is the leader's."""
    parts, width = model.parts, model.config.intermediate_size

    def held(share: Share) -> Held:
        own = share.part_of(model.config)
        head = 0 if share.is_leader else parts["head"]
        return Held(own, model.trunk_bytes - head, parts["expert"] * own.intermediate_size // width)

    return [held(share) for share in expert_shares(model.config, model.group_size or MIN_GROUP, usable)]


SPLITS: Mapping[str, Callable[[ModelParts, Sequence[int]], list[Held]]] = {
    "layers": _layer_shares,
    "experts": _expert_shares,
}
"""Ways of splitting: of a model and the bytes each machine may use, what each holds.

Raises:
    InvalidRequestError: more machines than can be given something, or a dense model's experts.
"""
