"""How many expert slots each layer gets under a memory budget, so that a token takes the least time.

A layer can be resident (E slots), have a bank of K to E - 1 slots of its own, or none: then it takes turns in an overflow bank
of K slots with the other layers of its kind, and finds nothing of its own there. What a token costs:

    compute    weights it passes through: the trunk and K experts per layer, over the memory's rate
    read-back  a synchronisation with the device in each layer that is not resident: only the router says what to read
    disk       experts missed over the disk's rate, but for the time in which those that were found are computed

The first is the same for every plan. The second is saved by whole layers only, the third by every slot: whether it pays to
make some layers resident or to give all of them some slots depends on the machine. It is a multiple-choice knapsack, solved by
dynamic programming.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, gcd

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.sizes import format_bytes, format_bytes_up

__all__ = ["ModelSizes", "ResidencyPlan", "Speeds", "min_expert_bytes", "plan_residency"]

# Where experts have no common unit, the room is cut into this many steps; what rounding leaves over is given out afterwards.
STEPS = 2**16

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Speeds:
    """What a plan weighs against each other, measured or published.

    Args:
        disk_bytes_per_s: of whole experts, as they are read in generation.
        memory_bytes_per_s: weights the device gets through while it decodes.
        readback_s: one synchronisation to learn a router's choice.
    """

    disk_bytes_per_s: float
    memory_bytes_per_s: float
    readback_s: float

    def __post_init__(self) -> None:
        if not (self.disk_bytes_per_s > 0 and self.memory_bytes_per_s > 0 and self.readback_s >= 0):
            raise InvalidRequestError(f"speeds must be above zero, and a read-back at least zero: {self}")


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model, in memory and on disk.

    Args:
        trunk_bytes: everything but experts, as it lies in memory.
        expert_bytes: one expert of each layer as it lies in memory.
        expert_file_bytes: the same as read from disk.
        kinds: layers of one kind have banks of equal shapes and may share an overflow bank.
    """

    trunk_bytes: int
    expert_bytes: tuple[int, ...]
    expert_file_bytes: tuple[int, ...]
    kinds: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int

    @property
    def all_expert_bytes(self) -> int:
        return sum(self.expert_bytes) * self.num_experts

    def slot_bytes(self, kind: int) -> int:
        """One slot of a kind's overflow bank."""
        return max(nbytes for nbytes, of in zip(self.expert_bytes, self.kinds, strict=True) if of == kind)


@dataclass(frozen=True)
class ResidencyPlan:
    """Slots, and what they are predicted to give: of every token, the time and the bytes read from disk.

    ``slots`` has a number for each layer: all experts where it is resident, 0 where it has only the overflow bank.
    ``overflow_slots`` is by kind, of those that have such layers.
    """

    slots: tuple[int, ...]
    overflow_slots: Mapping[int, int]
    expert_bytes: int
    """Of all slots together."""
    hit_rates: tuple[float, ...]
    readbacks_per_token: int
    misses_per_token: float
    bytes_per_token: float
    compute_s: float
    readback_s: float
    disk_s: float

    @property
    def seconds_per_token(self) -> float:
        return self.compute_s + self.readback_s + self.disk_s

    @property
    def tok_s(self) -> float:
        return 1.0 / self.seconds_per_token


def min_expert_bytes(sizes: ModelSizes) -> int:
    """Bytes of experts a model can do with: an overflow bank for each kind of layers, which holds the experts of one token."""
    return sum(sizes.slot_bytes(kind) for kind in set(sizes.kinds)) * sizes.num_experts_per_tok


def plan_residency(sizes: ModelSizes, room_bytes: int, speeds: Speeds, hit_rates: Floats) -> ResidencyPlan:
    """The slots that cost a token the least time, within ``room_bytes`` for experts.

    Args:
        hit_rates: ``[L, E + 1]`` by layer and slots, as ``trace.hit_rates`` gives them.

    Raises:
        MemoryBudgetError: the room is below ``min_expert_bytes``, which is named.
    """
    layers = len(sizes.expert_bytes)
    assert hit_rates.shape == (layers, sizes.num_experts + 1)
    if room_bytes < (least := min_expert_bytes(sizes)):
        raise MemoryBudgetError(
            f"{format_bytes(room_bytes)} for experts is too small: the experts of one token need {format_bytes_up(least)}; "
            "give more memory or a smaller context"
        )
    if room_bytes >= sizes.all_expert_bytes:
        slots = [sizes.num_experts] * layers
    else:
        costs = _streaming_costs(sizes, speeds, hit_rates)
        slots = _filled(sizes, room_bytes, costs, _best(sizes, room_bytes, costs))
    return _plan(sizes, room_bytes, speeds, hit_rates, slots)


def _choices(sizes: ModelSizes) -> range:
    """Slots a layer may have of its own."""
    return range(sizes.num_experts_per_tok, sizes.num_experts + 1)


def _disk_s(sizes: ModelSizes, speeds: Speeds, layer: int, hit_rate: float) -> float:
    """Expected seconds a token waits for a layer's experts, hits and misses of one token taken as independent."""
    per_token = sizes.num_experts_per_tok
    load_s = sizes.expert_file_bytes[layer] / speeds.disk_bytes_per_s
    compute_s = sizes.expert_bytes[layer] / speeds.memory_bytes_per_s
    return sum(
        comb(per_token, misses)
        * (1.0 - hit_rate) ** misses
        * hit_rate ** (per_token - misses)
        * max(misses * load_s - (per_token - misses) * compute_s, 0.0)
        for misses in range(1, per_token + 1)
    )


def _streaming_costs(sizes: ModelSizes, speeds: Speeds, hit_rates: Floats) -> Floats:
    """``[L, E + 1]``: seconds of a token a layer costs with S slots beyond what it costs when it is resident."""
    costs = np.full(hit_rates.shape, np.inf)
    for layer in range(len(costs)):
        for slots in (0, *_choices(sizes)):
            costs[layer, slots] = speeds.readback_s + _disk_s(sizes, speeds, layer, float(hit_rates[layer, slots]))
    costs[:, sizes.num_experts] = 0.0
    return costs


def _best(sizes: ModelSizes, room_bytes: int, costs: Floats) -> list[int]:
    """Dynamic programming over the room in equal steps, sizes rounded up.

    Layers go kind by kind, each kind twice: with an overflow bank, which is paid for once, and without.
    """
    unit = gcd(*sizes.expert_bytes)
    step = unit * max(1, -(-room_bytes // (unit * STEPS)))
    count = room_bytes // step + 1
    least = np.zeros(count)  # least time of the layers so far, by steps used at most
    shared: dict[int, npt.NDArray[np.bool_]] = {}
    picks: dict[tuple[int, bool], npt.NDArray[np.intp]] = {}
    for kind, members in _by_kind(sizes).items():
        bank_steps = -(-sizes.slot_bytes(kind) * sizes.num_experts_per_tok // step)
        ends = []
        for with_overflow in (False, True):
            best = _shifted(least, bank_steps) if with_overflow else least
            options = [0, *_choices(sizes)] if with_overflow else list(_choices(sizes))
            for layer in members:
                steps = [-(-slots * sizes.expert_bytes[layer] // step) for slots in options]
                rows = np.stack(
                    [_shifted(best, used) + costs[layer, slots] for slots, used in zip(options, steps, strict=True)]
                )
                # Of equal ones the first, which is the smallest.
                picks[layer, with_overflow] = np.asarray(options)[rows.argmin(axis=0)]
                best = rows.min(axis=0)
            ends.append(best)
        shared[kind] = ends[1] < ends[0]
        least = np.minimum(*ends)
    if not np.isfinite(least[-1]):  # rounding up left no room; one that is just above the least
        return [0] * len(costs)
    slots, at = [0] * len(costs), count - 1
    for kind, members in reversed(_by_kind(sizes).items()):
        with_overflow = bool(shared[kind][at])
        for layer in reversed(members):
            slots[layer] = int(picks[layer, with_overflow][at])
            at -= -(-slots[layer] * sizes.expert_bytes[layer] // step)
        if with_overflow:
            at -= -(-sizes.slot_bytes(kind) * sizes.num_experts_per_tok // step)
    return slots


def _shifted(values: Floats, steps: int) -> Floats:
    """``values`` with ``steps`` of the room gone."""
    moved = np.full(len(values), np.inf)
    if steps < len(values):
        moved[steps:] = values[: len(values) - steps]
    return moved


def _by_kind(sizes: ModelSizes) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for layer, kind in enumerate(sizes.kinds):
        members.setdefault(kind, []).append(layer)
    return members


def _filled(sizes: ModelSizes, room_bytes: int, costs: Floats, slots: list[int]) -> list[int]:
    """Give what room is left to layers, the most useful step first, until none fits."""
    while True:
        moves = []
        for layer, has in enumerate(slots):
            for more in _choices(sizes):
                change = costs[layer, more] - costs[layer, has]
                if more > has and change <= 0.0:
                    moved = [*slots[:layer], more, *slots[layer + 1 :]]
                    if _nbytes(sizes, moved, _overflow(sizes, moved)) <= room_bytes:
                        moves.append((change, layer, more))
        if not moves:
            return slots
        _, layer, slots[layer] = min(moves)


def _overflow(sizes: ModelSizes, slots: list[int]) -> dict[int, int]:
    kinds = sorted({kind for kind, has in zip(sizes.kinds, slots, strict=True) if has == 0})
    return dict.fromkeys(kinds, sizes.num_experts_per_tok)


def _nbytes(sizes: ModelSizes, slots: list[int], overflow: Mapping[int, int]) -> int:
    own = sum(has * nbytes for has, nbytes in zip(slots, sizes.expert_bytes, strict=True))
    return own + sum(has * sizes.slot_bytes(kind) for kind, has in overflow.items())


def _plan(sizes: ModelSizes, room_bytes: int, speeds: Speeds, hit_rates: Floats, slots: list[int]) -> ResidencyPlan:
    overflow = _overflow(sizes, slots)
    # The last of the room is of use to overflow banks: a long prompt computes some of their slots while others are read.
    for kind in overflow:
        spare = (room_bytes - _nbytes(sizes, slots, overflow)) // sizes.slot_bytes(kind)
        overflow[kind] = min(sizes.num_experts, overflow[kind] + spare)
    rates = [float(hit_rates[layer, has]) for layer, has in enumerate(slots)]
    streamed = [layer for layer, has in enumerate(slots) if has < sizes.num_experts]
    misses = {layer: sizes.num_experts_per_tok * (1.0 - rates[layer]) for layer in streamed}
    chosen_bytes = sum(sizes.expert_bytes) * sizes.num_experts_per_tok
    return ResidencyPlan(
        tuple(slots),
        overflow,
        _nbytes(sizes, slots, overflow),
        tuple(rates),
        readbacks_per_token=len(streamed),
        misses_per_token=sum(misses.values()),
        bytes_per_token=sum(missed * sizes.expert_file_bytes[layer] for layer, missed in misses.items()),
        compute_s=(sizes.trunk_bytes + chosen_bytes) / speeds.memory_bytes_per_s,
        readback_s=len(streamed) * speeds.readback_s,
        disk_s=sum(_disk_s(sizes, speeds, layer, rates[layer]) for layer in streamed),
    )
