"""How a model is split over several machines: what each one holds, and what a token then costs. Arithmetic only.

    layers    a run of whole layers on each machine; a token passes through one machine after another
    experts   a slice of every expert's width on each machine, attention on all; one sum of all machines in each layer

Machine 0 leads: it alone has the output head, and with ``layers`` the embedding too. Seconds of a token, where A, H and E are
the bytes it reads of attention with routers and norms, of the head, and of its experts, B the bytes a second that a machine
reads, n machines, L layers, s the largest share of the experts (1/n of equal machines), c one collective:

    one machine   (A + H + E) / B
    layers        (A + H + E) / B + n c
    experts       (A + H + s E) / B + L c
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.info.estimate import bytes_per_token
from mlx_mixtral.info.links import LinkSpeed

__all__ = ["BANDWIDTH_SHARE", "SPLITS", "Held", "ModelParts", "TokenBytes", "decoding_rate"]

BANDWIDTH_SHARE = 0.75
"""Of a chip's published bandwidth: what decoding is assumed to reach."""
# Columns of an expert that are never parted where no quantisation group is larger: 32 weights of any bits are whole words.
MIN_GROUP = 32


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


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that one token reads.

    Args:
        shared: attention, routers, norms and the head.
        experts: the chosen experts of all layers.
    """

    shared: int
    experts: int

    @classmethod
    def of(cls, model: ModelParts) -> TokenBytes:
        config = model.config
        experts = model.parts["expert"] * config.num_experts_per_tok // config.num_local_experts
        return cls(bytes_per_token(config, dict(model.parts)) - experts, experts)

    def one_machine_s(self, bandwidth_gb_s: float) -> float:
        """Seconds of a token on one machine that holds everything."""
        return (self.shared + self.experts) / decoding_rate(bandwidth_gb_s)

    def layers_s(self, bandwidth_gb_s: float, link: LinkSpeed, machines: int) -> float:
        """Seconds of a token with layers split: everything is read in turn, and handed on ``machines`` times."""
        return self.one_machine_s(bandwidth_gb_s) + machines * link.hop_s

    def experts_s(
        self, bandwidth_gb_s: float, link: LinkSpeed, machines: int, layers: int, largest: float | None = None
    ) -> float:
        """Seconds of a token with experts split; ``largest`` is the largest share of them, that of equal machines if None."""
        read = self.shared + self.experts * (1 / machines if largest is None else largest)
        return read / decoding_rate(bandwidth_gb_s) + layers * link.collective_s(machines)


def _layer_shares(model: ModelParts, usable: Sequence[int]) -> list[Held]:
    """What each machine holds with layers split; layers are taken as equally large."""
    config, parts, layers = model.config, model.parts, model.config.num_hidden_layers
    if len(usable) > layers:
        raise InvalidRequestError(f"{len(usable)} machines cannot share {layers} layers; use at most {layers} machines")
    norms = parts["norms"] * 2 * layers // (2 * layers + 1)  # all but the last one
    trunk, experts = (parts["attention"] + parts["router"] + norms) // layers, parts["expert"] // layers
    leader = sum(parts.values()) - layers * (trunk + experts)
    counts = _counts(layers, trunk + experts, usable, leader)
    return [
        Held(replace(config, num_hidden_layers=count), count * trunk + (0 if rank else leader), count * experts)
        for rank, count in enumerate(counts)
    ]


def _expert_shares(model: ModelParts, usable: Sequence[int]) -> list[Held]:
    """The same with experts split: whole quantisation groups of their width; the head is machine 0's."""
    config, parts, width = model.config, model.parts, model.config.intermediate_size
    if config.is_dense:
        raise InvalidRequestError("a dense model has no experts to split; its layers can be")
    group = max(model.group_size or MIN_GROUP, MIN_GROUP)
    groups = -(-width // group)
    if len(usable) > groups:
        raise InvalidRequestError(
            f"{len(usable)} machines cannot share experts of {groups} groups of {group} columns; use at most {groups} machines"
        )
    ends = [0]
    for count in _counts(groups, 1, usable, 0):
        ends.append(min(ends[-1] + count * group, width))
    return [
        Held(
            replace(config, intermediate_size=stop - start),
            model.trunk_bytes - (parts["head"] if rank else 0),
            parts["expert"] * (stop - start) // width,
        )
        for rank, (start, stop) in enumerate(pairwise(ends))
    ]


def _counts(items: int, each: int, usable: Sequence[int], leader: int) -> list[int]:
    """How many equal items each machine gets, at least one: the fullest machine is as little full as can be."""
    counts = [1] * len(usable)

    def fullness(rank: int) -> float:
        return ((counts[rank] + 1) * each + (0 if rank else leader)) / usable[rank]

    for _ in range(items - len(usable)):
        counts[min(range(len(usable)), key=fullness)] += 1
    return counts


SPLITS: Mapping[str, Callable[[ModelParts, Sequence[int]], list[Held]]] = {
    "layers": _layer_shares,
    "experts": _expert_shares,
}
"""Ways of splitting: of a model and the bytes each machine may use, what each holds.

Raises:
    InvalidRequestError: more machines than can be given something, or a dense model's experts.
"""
