"""Which part of a model each machine of a group holds: arithmetic only.

``experts``   every machine has the trunk (embedding, attention, routers, norms) and a slice of the width F of every expert:
              rows of gate and up, columns of down. What experts of all machines give is summed in each layer.
``layers``    every machine has a run of decoder layers; the leader also the embedding, the final norm and the head.

Either way the output head is the leader's, machine 0. Slices are whole quantisation groups and layers are whole, so shares
are uneven where the numbers are: 14336 columns in groups of 64 are 75, 75 and 74 groups on three machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import check_integer, is_number, shown
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["MIN_GROUP", "Share", "Split", "expert_shares", "layer_shares"]

Split = Literal["experts", "layers"]

MIN_GROUP = 32
"""Columns that are never parted: 32 weights of any number of bits are whole words."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """What machine ``rank`` of ``size`` holds.

    Args:
        layers: decoder layers, as the checkpoint counts them.
        columns: of the experts' width F; None for all of it.
    """

    rank: int
    size: int
    split: Split
    layers: range
    columns: range | None

    @property
    def is_leader(self) -> bool:
        """Whether it is the machine that has the output head."""
        return self.rank == 0

    def holds(self, layer: int | None, *, is_head: bool = False) -> bool:
        """Whether a matrix or norm of ``layer`` is in it; None for what no layer has: embedding, final norm and head."""
        if layer is not None:
            return layer in self.layers
        return self.is_leader or (self.split == "experts" and not is_head)

    def part_of(self, config: MixtralConfig) -> MixtralConfig:
        """The configuration of what it holds: as many layers, and experts as wide."""
        width = config.intermediate_size if self.columns is None else len(self.columns)
        return replace(config, num_hidden_layers=len(self.layers), intermediate_size=width)


def expert_shares(config: MixtralConfig, group_size: int, weights: Sequence[float]) -> list[Share]:
    """Cut the width of all experts in proportion to ``weights``, a machine each.

    Args:
        group_size: columns that stay together: the largest quantisation group of the experts, at least ``MIN_GROUP``.
        weights: relative sizes, such as bytes of memory or ones.

    Raises:
        InvalidRequestError: a dense model, more machines than groups, or weights that are not above zero.
    """
    size = _checked(weights)
    check_integer("group_size", group_size, 1)
    if config.is_dense:
        raise InvalidRequestError(
            f"split 'experts' needs a model with experts, and this is a dense {config.architecture} model; split by 'layers'"
        )
    group, width = math.lcm(group_size, MIN_GROUP), config.intermediate_size
    groups = -(-width // group)
    if size > groups:
        raise InvalidRequestError(
            f"{size} machines cannot share experts of width {width}: it has {groups} groups of {group}, and every machine "
            f"needs one; use at most {groups}, or split by 'layers'"
        )
    counts = [1] * size
    for _ in range(groups - size):
        # Whoever is the least full afterwards: the fullest one is as little full as can be.
        counts[min(range(size), key=lambda rank: ((counts[rank] + 1) / weights[rank], rank))] += 1
    ends = [0, *(min(int(end) * group, width) for end in np.cumsum(counts))]
    layers = range(config.num_hidden_layers)
    return [Share(rank, size, "experts", layers, range(ends[rank], ends[rank + 1])) for rank in range(size)]


def layer_shares(
    config: MixtralConfig,
    weights: Sequence[float],
    *,
    layer_bytes: Sequence[int] | None = None,
    leader_bytes: int = 0,
) -> list[Share]:
    """Give every machine a run of decoder layers, so that the fullest one, by its weight, is as little full as can be.

    Args:
        weights: relative sizes, such as bytes of memory or ones.
        layer_bytes: of each layer in memory; all alike when None.
        leader_bytes: what the leader holds besides, in the same unit: embedding, final norm and head. 0 leaves it out.

    Raises:
        InvalidRequestError: more machines than layers, weights that are not above zero, or bytes of another number of layers.
    """
    size, layers = _checked(weights), config.num_hidden_layers
    if size > layers:
        raise InvalidRequestError(
            f"{size} machines cannot share {layers} layers: every machine needs one; use at most {layers}"
        )
    sizes = [1] * layers if layer_bytes is None else list(layer_bytes)
    if len(sizes) != layers:
        raise InvalidRequestError(
            f"layer_bytes has {len(sizes)} numbers; the model has {layers} layers: give one for each"
        )
    check_integer("leader_bytes", leader_bytes, 0)
    above = np.concatenate([[0], np.cumsum(sizes, dtype=np.float64)])
    run = above[None, :] - above[:, None]  # [start, stop]
    run[np.tril_indices(layers + 1)] = np.inf
    held = [run + (leader_bytes if rank == 0 else 0) for rank in range(size)]
    fullness = [nbytes / weight for nbytes, weight in zip(held, weights, strict=True)]
    fullest, _ = _cheapest(fullness, np.maximum)
    # Of those the most even one: the sum of squares, each by its weight, is least where bytes are as weights.
    squares = [np.where(full <= fullest, full * nbytes, np.inf) for full, nbytes in zip(fullness, held, strict=True)]
    _, ends = _cheapest(squares, np.add)
    return [Share(rank, size, "layers", range(ends[rank], ends[rank + 1]), None) for rank in range(size)]


def _cheapest(costs: Sequence[Floats], join: np.ufunc) -> tuple[float, list[int]]:
    """Runs of the least cost, one a machine: ``costs[rank][start, stop]``, brought together by ``join``; and their ends."""
    best: Floats = np.full(len(costs[0]), np.inf)
    best[0] = 0.0
    starts = []
    for cost in costs:
        joined = join(best[:, None], cost)
        starts.append(joined.argmin(axis=0))
        best = joined.min(axis=0)
    ends = [len(best) - 1]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return float(best[-1]), ends[::-1]


def _checked(weights: Sequence[float]) -> int:
    """How many machines there are."""
    if not weights:
        raise InvalidRequestError("there are no machines to share the model: give at least one weight")
    for weight in weights:
        if not is_number(weight) or not 0 < weight < math.inf:
            raise InvalidRequestError(
                f"a machine has weight {shown(weight)}; it must be a number above 0, such as its memory"
            )
    return len(weights)
