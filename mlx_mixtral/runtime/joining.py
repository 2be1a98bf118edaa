"""Loading on several machines: that they are alike, which split they use, what each of them holds, and how much all allow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.arguments import check_type, is_number, shown
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.distributed.cost import TokenBytes
from mlx_mixtral.distributed.group import Group
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.distributed.meeting import agree
from mlx_mixtral.distributed.shares import Share, expert_shares, layer_shares
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.machine.bandwidth import memory_bandwidth
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.held import expert_group_size
from mlx_mixtral.model.planning import make_planner
from mlx_mixtral.runtime.filling import LoadedWeights, LoadProgress, load_module, refuse_cpu_gather, room_for
from mlx_mixtral.sizes import parse_size

__all__ = ["SPLITS", "agreed_plan", "check_joining", "choose_shares", "load_share", "sum_seconds"]

SPLITS = ("auto", "experts", "layers")
REPEATS = 12


@dataclass(frozen=True)
class _Seen:
    """What one machine says of a choice."""

    usable_bytes: int | None
    sum_s: float
    bytes_per_s: float


def sum_seconds(group: Group, numbers: int) -> float:
    """The median time of one sum of so many float32 numbers. All machines must come here."""
    times = []
    with group.deadline.armed("the other machines"):
        for _ in range(REPEATS):
            x = mx.ones(numbers, mx.float32)
            mx.eval(x)
            started = time.perf_counter()
            mx.eval(group.sum(x))
            times.append(time.perf_counter() - started)
            group.deadline.progress()
    return statistics.median(times[2:])


def load_share(
    group: Group,
    build: Callable[..., Builder],
    place: Device,
    kv: KVOptions,
    memory: str | float | None,
    context: int | None,
    progress: Callable[[LoadProgress], None] | None,
    *,
    split: str,
    shares: Sequence[float] | None,
    adapters: Sequence[Adapter] = (),
) -> LoadedWeights:
    """This machine's share of a model, joined with the others'; arguments as of ``load``. All machines must come here.

    Raises:
        MixtralError: as ``load``.
        GroupError: another machine failed.
    """

    def whole() -> Builder:
        found = build()
        refuse_cpu_gather(found, place)
        return found

    builder, _ = agree(group, whole, lambda found: True)
    usable = usable_bytes(place, read_system_memory()) if memory is None else parse_size(memory)
    parts = choose_shares(group, builder, lambda share: build(share=share), split, shares, usable)
    builder = build(share=parts[group.rank])

    def planned() -> tuple[Planner, MemoryPlan]:
        planner = make_planner(builder, place, kv=kv)
        planner.adapter_bytes = room_for(builder, adapters, place)
        return planner, planner.plan(memory, context)

    planner, plan = agreed_plan(group, planned, builder.config.max_context_tokens)
    (module, residency), _ = agree(group, lambda: load_module(builder, plan, progress), lambda made: True)
    module.join(link := Link(group, parts))
    link.start()
    return LoadedWeights(builder, planner, module, residency)


def choose_shares(
    group: Group,
    whole: Builder,
    build: Callable[[Share], Builder],
    split: str,
    shares: Sequence[float] | None,
    usable_bytes: int | None,
) -> list[Share]:
    """What every machine holds, the same list on each.

    Args:
        whole: of the whole checkpoint.
        build: of a share of it.
        shares: relative sizes by rank; by the memory of the machines when None, equal where that is not known.
        usable_bytes: what this machine can give.

    Raises:
        InvalidRequestError: shares that are none, or a model that cannot be cut so.
        GroupError: another machine failed.
    """
    config = whole.config
    if shares is not None and len(shares) != group.size:
        raise InvalidRequestError(
            f"shares is {list(shares)}; give a number above 0 for each of the {group.size} machines"
        )
    latency = sum_seconds(group, config.hidden_size)
    _, told = agree(group, lambda: _Seen(usable_bytes, latency, memory_bandwidth(2**26, 3)), asdict)
    every = [_Seen(**each) for each in told]
    memory = [each.usable_bytes for each in every]
    known = [float(nbytes) for nbytes in memory if nbytes is not None]
    weights = list(shares) if shares else known if len(known) == group.size else [1.0] * group.size
    if split != "auto":
        return _shares(split, whole, weights)
    if config.is_dense:
        return _shares("layers", whole, weights)
    candidates: dict[str, list[Share]] = {}
    problem: InvalidRequestError | None = None
    for name in ("experts", "layers"):
        try:
            candidates[name] = _shares(name, whole, weights)
        except InvalidRequestError as error:
            problem = error
    if len(candidates) < 2:
        if not candidates and problem is not None:
            raise problem
        return next(iter(candidates.values()))
    _, fits = agree(
        group,
        lambda: {
            name: usable_bytes is None or build(found[group.rank]).memory_bytes <= usable_bytes
            for name, found in candidates.items()
        },
        lambda found: found,
    )
    fitting = [name for name in candidates if all(each[name] for each in fits)]
    if len(fitting) == 1:
        return candidates[fitting[0]]
    return candidates["experts" if _experts_are_faster(whole, candidates["experts"], every[0]) else "layers"]


def _shares(split: str, whole: Builder, weights: Sequence[float]) -> list[Share]:
    config, held = whole.config, whole.held
    if split == "experts":
        return expert_shares(config, expert_group_size(config, whole.checkpoint), weights)
    layer_bytes = [0] * config.num_hidden_layers
    leader_bytes = 0
    for matrix in held.matrices.values():
        if matrix.layer is None:
            leader_bytes += held.matrix_bytes(matrix)
        else:
            layer_bytes[matrix.layer] += held.matrix_bytes(matrix)
    return layer_shares(config, weights, layer_bytes=layer_bytes, leader_bytes=leader_bytes)


def _experts_are_faster(whole: Builder, experts: Sequence[Share], first: _Seen) -> bool:
    """Whether a token should take less time with experts split than with layers split, by what the leader has measured."""
    sizes, config = whole.sizes(), whole.config
    token = TokenBytes(sizes.trunk_bytes, sum(sizes.expert_bytes) * config.num_experts_per_tok)
    largest = max(share.part_of(config).intermediate_size for share in experts) / config.intermediate_size
    apart = token.experts_s(first.bytes_per_s, first.sum_s, config.num_hidden_layers, largest)
    return apart < token.layers_s(first.bytes_per_s, first.sum_s, len(experts))


def agreed_plan(
    group: Group, plan: Callable[[], tuple[Planner, MemoryPlan]], own_context: int
) -> tuple[Planner, MemoryPlan]:
    """This machine's planner and plan, with what all machines have room for.

    Raises:
        MixtralError: of ``plan``.
        GroupError: another machine's failed.
    """

    def tell(made: tuple[Planner, MemoryPlan]) -> dict[str, Any]:
        own = made[1]
        return {
            "is_bound": own.is_bound,
            "capacity": own.context_capacity if own.budget_bytes is not None else own_context,
            "columns": own.kv_columns,
            "chunk": own.chunk_tokens,
        }

    (planner, own), told = agree(group, plan, tell)
    chunk = min(each["chunk"] for each in told)
    bound = [each for each in told if each["is_bound"]]
    if not bound:
        return planner, replace(own, chunk_tokens=chunk)
    return planner, replace(
        own,
        # A machine with room to spare keeps to what the others have.
        budget_bytes=own.resident_bytes if own.budget_bytes is None else own.budget_bytes,
        context_capacity=min(each["capacity"] for each in bound),
        kv_columns=(columns := min(each["columns"] for each in bound)),
        # What the leader keeps of prompts is bounded by it, and the others keep as many tokens.
        kv_bytes=own.kv_bytes * columns // own.kv_columns,
        chunk_tokens=chunk,
    )


def check_joining(group: object, split: object, shares: object, peer_timeout_s: object) -> None:
    """Raise InvalidRequestError for arguments of ``load`` that are none."""
    if group is not None:
        check_type("group", group, mx.distributed.Group, "what join_group gives, or None")
    if not isinstance(split, str) or split not in SPLITS:
        raise InvalidRequestError(f"split is {shown(split)}; it must be auto, experts or layers")
    sizes = shares if isinstance(shares, list | tuple) else ()
    if shares is not None and not (sizes and all(is_number(each) and 0 < each < math.inf for each in sizes)):
        raise InvalidRequestError(f"shares is {shown(shares)}; give a number above 0 for each machine, or None")
    if not is_number(peer_timeout_s) or not 0 < peer_timeout_s < math.inf:
        raise InvalidRequestError(f"peer_timeout_s is {shown(peer_timeout_s)}; it must be a number of seconds above 0")
