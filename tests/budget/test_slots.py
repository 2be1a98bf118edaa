"""Plans against all plans there are, against simple ones, and with more room."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.budget import slots as slots_module
from mlx_mixtral.budget.slots import ModelSizes, ResidencyPlan, Speeds, min_expert_bytes, plan_residency
from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.experts.trace import hit_rates, published_trace

Floats = npt.NDArray[np.float64]
MIXTRAL = ModelSizes(900, (99,) * 32, (99,) * 32, (0,) * 32, 8, 2)
RATES = hit_rates(published_trace(32, 8, 2, tokens=1000))
# Bytes are MB here.
USUAL = Speeds(disk_bytes_per_s=5e3, memory_bytes_per_s=300e3, readback_s=300e-6)


def bytes_of(sizes: ModelSizes, slots: tuple[int, ...]) -> int:
    own = sum(has * nbytes for has, nbytes in zip(slots, sizes.expert_bytes, strict=True))
    shared = {
        kind: nbytes for kind, nbytes, has in zip(sizes.kinds, sizes.expert_bytes, slots, strict=True) if has == 0
    }
    return own + sum(shared.values()) * sizes.num_experts_per_tok


def seconds(sizes: ModelSizes, speeds: Speeds, rates: Floats, slots: tuple[int, ...]) -> float:
    """The cost model, by going through what can happen to each expert of a token."""
    total = sizes.trunk_bytes / speeds.memory_bytes_per_s
    for layer, has in enumerate(slots):
        compute = sizes.expert_bytes[layer] / speeds.memory_bytes_per_s
        total += sizes.num_experts_per_tok * compute
        if has == sizes.num_experts:
            continue
        total += speeds.readback_s
        for found in product((False, True), repeat=sizes.num_experts_per_tok):
            chance = np.prod([rates[layer, has] if hit else 1 - rates[layer, has] for hit in found])
            loading = found.count(False) * sizes.expert_file_bytes[layer] / speeds.disk_bytes_per_s
            total += float(chance) * (loading - min(loading, found.count(True) * compute))
    return total


def all_slots(sizes: ModelSizes) -> list[tuple[int, ...]]:
    options = [0, *range(sizes.num_experts_per_tok, sizes.num_experts + 1)]
    return list(product(options, repeat=len(sizes.kinds)))


@st.composite
def instances(draw: st.DrawFn, layers: int = 3, most: int = 4) -> tuple[ModelSizes, Speeds, Floats]:
    experts = draw(st.integers(1, most))
    per_token = draw(st.integers(1, min(2, experts)))
    kind_bytes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    kinds = draw(st.lists(st.integers(0, len(kind_bytes) - 1), min_size=1, max_size=layers))
    nbytes = tuple(kind_bytes[kind] for kind in kinds)
    on_disk = tuple(draw(st.integers(1, 40)) for _ in kinds)
    sizes = ModelSizes(draw(st.integers(0, 50)), nbytes, on_disk, tuple(kinds), experts, per_token)
    rate = st.floats(0.1, 100)
    speeds = Speeds(draw(rate), draw(rate), draw(st.floats(0, 10)))
    rates = np.zeros((len(kinds), experts + 1))
    for row in rates:
        row[per_token:] = sorted(draw(st.floats(0, 1)) for _ in row[per_token:])
    rates[:, -1] = 1
    return sizes, speeds, rates


@settings(deadline=None)
@given(instances(), st.floats(0, 1.1))
def test_no_plan_is_better_and_none_is_over_the_room(made: tuple[ModelSizes, Speeds, Floats], share: float) -> None:
    sizes, speeds, rates = made
    least = min_expert_bytes(sizes)
    room = int(least + share * max(sum(sizes.expert_bytes) * sizes.num_experts - least, 0))
    found = plan_residency(sizes, room, speeds, rates)
    assert bytes_of(sizes, found.slots) <= found.expert_bytes <= room
    possible = [slots for slots in all_slots(sizes) if bytes_of(sizes, slots) <= room]
    assert found.slots in possible
    best = min(seconds(sizes, speeds, rates, slots) for slots in possible)
    assert found.seconds_per_token == pytest.approx(best, rel=1e-9)
    assert seconds(sizes, speeds, rates, found.slots) == pytest.approx(best, rel=1e-9)


def concentrated(sizes: ModelSizes, room: int) -> tuple[int, ...]:
    """As many whole layers as fit, the others share."""
    slots = [0] * len(sizes.kinds)
    for layer in range(len(slots)):
        more = (*slots[:layer], sizes.num_experts, *slots[layer + 1 :])
        if bytes_of(sizes, more) <= room:
            slots[layer] = sizes.num_experts
    return tuple(slots)


def spread(sizes: ModelSizes, room: int) -> tuple[int, ...]:
    """Slots one after another to all layers in turn."""
    slots = (0,) * len(sizes.kinds)
    for count in range(sizes.num_experts_per_tok, sizes.num_experts + 1):
        for layer in range(len(slots)):
            more = (*slots[:layer], count, *slots[layer + 1 :])
            if bytes_of(sizes, more) <= room:
                slots = more
    return slots


@settings(deadline=None)
@given(instances(layers=12, most=8), st.floats(0, 1))
def test_plans_are_never_worse_than_concentrating_or_spreading(
    made: tuple[ModelSizes, Speeds, Floats], share: float
) -> None:
    sizes, speeds, rates = made
    least = min_expert_bytes(sizes)
    room = int(least + share * max(sum(sizes.expert_bytes) * sizes.num_experts - least, 0))
    found = plan_residency(sizes, room, speeds, rates).seconds_per_token
    for simple in (concentrated, spread):
        assert found <= seconds(sizes, speeds, rates, simple(sizes, room)) * (1 + 1e-9)


@settings(deadline=None)
@given(instances(layers=12, most=8), st.integers(0, 3000), st.integers(0, 300))
def test_more_room_is_never_slower(made: tuple[ModelSizes, Speeds, Floats], room: int, more: int) -> None:
    sizes, speeds, rates = made
    room += min_expert_bytes(sizes)
    slower, faster = (plan_residency(sizes, size, speeds, rates) for size in (room, room + more))
    assert faster.seconds_per_token <= slower.seconds_per_token * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(instances(layers=6, most=8), st.floats(0, 1))
def test_coarse_steps_cost_little_and_never_the_room(made: tuple[ModelSizes, Speeds, Floats], share: float) -> None:
    sizes, speeds, rates = made
    least = min_expert_bytes(sizes)
    room = int(least + share * max(sum(sizes.expert_bytes) * sizes.num_experts - least, 0))
    exact = plan_residency(sizes, room, speeds, rates)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "STEPS", 16)
        coarse = plan_residency(sizes, room, speeds, rates)
    assert coarse.expert_bytes <= room
    assert coarse.seconds_per_token >= exact.seconds_per_token * (1 - 1e-9)
    assert coarse.seconds_per_token <= seconds(sizes, speeds, rates, (0,) * len(sizes.kinds)) * (1 + 1e-9)


def plan(room: int, speeds: Speeds = USUAL, sizes: ModelSizes = MIXTRAL, rates: Floats = RATES) -> ResidencyPlan:
    return plan_residency(sizes, room, speeds, rates)


def test_everything_that_fits_is_resident_and_never_read_back() -> None:
    whole = 32 * 8 * 99
    found = plan(whole)
    assert found.slots == (8,) * 32
    assert (found.readbacks_per_token, found.misses_per_token, found.bytes_per_token) == (0, 0, 0)
    assert (found.readback_s, found.disk_s, found.overflow_slots) == (0, 0, {})
    assert found.seconds_per_token == (900 + 32 * 2 * 99) / 300e3
    assert plan(whole - 1).readbacks_per_token == 1


def test_the_least_is_one_overflow_bank_a_kind() -> None:
    mixed = ModelSizes(0, (5, 7, 5, 7), (5, 7, 5, 7), (0, 1, 0, 1), 8, 2)
    assert min_expert_bytes(mixed) == 2 * (5 + 7)
    found = plan_residency(mixed, 24, USUAL, RATES[:4])
    assert found.slots == (0, 0, 0, 0)
    assert dict(found.overflow_slots) == {0: 2, 1: 2}
    assert found.misses_per_token == 8
    assert found.bytes_per_token == 48


def test_room_below_the_least_names_the_least() -> None:
    with pytest.raises(MemoryBudgetError, match=r"197 B for experts is too small.* need 198.00 B"):
        plan(197)


def test_dear_readbacks_concentrate_and_a_slow_disk_spreads() -> None:
    room = 32 * 5 * 99
    dear = plan(room, Speeds(1e9, 300e3, 10e-3))
    assert set(dear.slots) <= {0, 8} | {dear.slots[i] for i in range(32) if 0 < dear.slots[i] < 8}
    assert sum(has == 8 for has in dear.slots) == (room - 2 * 99) // (8 * 99)
    slow = plan(room, Speeds(1e3, 300e3, 0.0))
    assert slow.misses_per_token < dear.misses_per_token
    assert slow.readbacks_per_token > dear.readbacks_per_token


def test_what_is_left_over_goes_to_the_overflow_bank() -> None:
    found = plan(3 * 99, sizes=ModelSizes(0, (99, 99), (99, 99), (0, 0), 8, 2), rates=RATES[:2])
    assert (found.slots, dict(found.overflow_slots), found.expert_bytes) == ((0, 0), {0: 3}, 3 * 99)


def test_equal_plans_are_settled_the_same_way_each_time() -> None:
    assert plan(10_000) == plan(10_000)


def test_overlap_hides_loads_behind_hits() -> None:
    """An expert that loads faster than the other one computes costs nothing but when both are missing."""
    sizes = ModelSizes(0, (10,), (1,), (0,), 4, 2)
    rates = np.array([[0.0, 0.0, 0.5, 0.75, 1.0]])
    found = plan_residency(sizes, 20, Speeds(10.0, 10.0, 0.0), rates)
    assert found.slots == (2,)
    assert found.disk_s == pytest.approx(0.25 * 2 * 0.1)


@pytest.mark.parametrize("speeds", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (float("nan"), 1, 1)])
def test_speeds_that_are_none_are_refused(speeds: tuple[Any, Any, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="above zero"):
        Speeds(*speeds)


def test_a_model_of_many_kinds_leaves_less_than_one_slot_unused() -> None:

    random = np.random.default_rng(0)
    kind_bytes = random.integers(50_000_000, 200_000_000, 12)
    kinds = tuple(int(kind) for kind in random.integers(0, 12, 56))
    nbytes = tuple(int(kind_bytes[kind]) for kind in kinds)
    sizes = ModelSizes(3 * 10**9, nbytes, nbytes, kinds, 8, 2)
    room = sum(nbytes) * 4
    rates = hit_rates(published_trace(56, 8, 2, tokens=500))
    found = plan_residency(sizes, room, Speeds(5e9, 300e9, 3e-4), rates)
    assert room - found.expert_bytes < max(nbytes)
