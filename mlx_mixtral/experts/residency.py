"""Which experts stay in memory: the plan in force, what it did so far, and changing it under a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.slots import ModelSizes
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.experts.policy import make_policy
from mlx_mixtral.experts.pool import Key, SlotPool
from mlx_mixtral.experts.store import Counters, ExpertStore
from mlx_mixtral.layers.expert_bank import ExpertBank
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral.weights.dtypes import bytes_of
from mlx_mixtral.weights.fill import fill

__all__ = ["Residency"]

AllocateBank = Callable[[int, int], ExpertBank]
"""(layer, slots) to an allocated bank of that layer's packing."""


class Residency:
    """What stays in memory, and the counts of what did not: ``model.residency`` of a loaded model.

    Args:
        layers: experts of every layer; empty for a dense model.
        overflow: pools that layers share, by kind.
        plan: the plan they were allocated by; ``plan`` is the one in force.
        policy: which expert makes room, by name.
    """

    def __init__(
        self,
        store: ExpertStore,
        sizes: ModelSizes,
        layers: Sequence[GatheredExperts],
        overflow: Mapping[int, SlotPool],
        plan: MemoryPlan,
        policy: str,
    ) -> None:
        self.store, self.sizes, self.layers, self.policy = store, sizes, layers, policy
        self.overflow = dict(overflow)
        self.plan = plan
        self._is_released = False

    def __repr__(self) -> str:
        if self._is_released:
            return "<Residency: released>"
        streamed = sum(layer.pool is not None for layer in self.layers)
        text = f"<Residency: {format_bytes(self.resident_bytes)} of weights in memory"
        if streamed:
            text += (
                f"; {streamed} of {len(self.layers)} layers stream experts: {self.hits} hits, {self.misses} misses, "
            )
            text += f"{format_bytes(self.bytes_read)} read"
        return text + ">"

    @property
    def budget_bytes(self) -> int | None:
        """What was asked for, or found where not everything fits; None when everything is resident without a budget."""
        return self.plan.budget_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for the KV cache of ``plan.context_tokens`` tokens."""
        return self.plan.kv_bytes

    @property
    def slots(self) -> tuple[int, ...]:
        """Expert slots of each layer: the number of experts where all are resident, 0 for a share in an overflow bank."""
        shared = list(self.overflow.values())
        return tuple(
            self.sizes.num_experts if layer.pool is None else 0 if layer.pool in shared else layer.pool.size
            for layer in self.layers
        )

    @property
    def is_streamed(self) -> bool:
        """Whether some experts are read from disk when they are needed."""
        return any(layer.pool is not None for layer in self.layers)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in memory, slots that hold nothing yet included."""
        if self._is_released:
            return 0
        own = sum(slots * nbytes for slots, nbytes in zip(self.slots, self.sizes.expert_bytes, strict=True))
        shared = sum(
            pool.size * self.sizes.expert_bytes[self.sizes.kinds.index(kind)] for kind, pool in self.overflow.items()
        )
        return self.sizes.trunk_bytes + own + shared

    @property
    def counters(self) -> Counters:
        return self.store.counters

    @property
    def hits(self) -> int:
        """Experts that a call needed and that were in memory, since loading; calls of resident layers are not counted."""
        return self.counters.hits

    @property
    def misses(self) -> int:
        """Experts that had to be read."""
        return self.counters.misses

    @property
    def readbacks(self) -> int:
        """Times a router's choice was read back from the device."""
        return self.counters.readbacks

    @property
    def bytes_read(self) -> int:
        """Bytes of experts read from disk since loading."""
        return self.counters.bytes_read

    @property
    def disk_wait_s(self) -> float:
        """Time the host waited for the disk; the device may have computed meanwhile."""
        return self.counters.wait_s

    def to_dict(self) -> dict[str, Any]:
        """All figures as a JSON object."""
        plan = self.plan
        return {
            "budget_bytes": self.budget_bytes,
            "resident_bytes": self.resident_bytes,
            "kv_bytes": self.kv_bytes,
            "working_bytes": plan.working_bytes,
            "context": plan.context_tokens,
            "chunk_tokens": plan.chunk_tokens,
            "slots": list(self.slots),
            "overflow_slots": sum(pool.size for pool in self.overflow.values()),
            "hits": self.hits,
            "misses": self.misses,
            "readbacks": self.readbacks,
            "bytes_read": self.bytes_read,
            "disk_wait_s": self.disk_wait_s,
            "predicted_tok_s": plan.tok_s,
        }

    def close(self) -> None:
        """Close the files experts are read from."""
        self.store.close()

    def release(self) -> None:
        """Free all expert memory; the model is not used any more."""
        self.layers, self.overflow, self._is_released = (), {}, True

    def change(self, plan: MemoryPlan, allocate: AllocateBank) -> None:
        """Go over to another plan: layers that shrink first, so that memory is given before it is taken.

        An expert that is in memory and stays is copied, not read. If a read fails the layer at hand goes on streaming.

        Raises:
            CheckpointError: an expert of a layer that becomes resident cannot be read.
        """
        for pool in self._pools():
            pool.finish_prefetched()
            pool.wait()
        before, shared = self.slots, plan.overflow_slots
        after = (self.sizes.num_experts,) * len(before) if plan.slots is None else plan.slots
        for kind, count in shared.items():
            layer = self.sizes.kinds.index(kind)
            if kind not in self.overflow:
                self.overflow[kind] = SlotPool(allocate(layer, count), count, make_policy(self.policy))
            elif self.overflow[kind].size != count:
                self._resize(self.overflow[kind], layer, count, allocate)
                for gathered in self.layers:
                    if gathered.pool is self.overflow[kind]:
                        gathered.make_streamed(self.overflow[kind])
        self.plan = plan
        for layer in sorted(range(len(before)), key=lambda layer: after[layer] - before[layer]):
            if after[layer] != before[layer]:
                self._change_layer(layer, after[layer], allocate)
                mx.clear_cache()
        self.overflow = {kind: pool for kind, pool in self.overflow.items() if kind in shared}
        mx.clear_cache()

    def _change_layer(self, layer: int, slots: int, allocate: AllocateBank) -> None:
        gathered, experts = self.layers[layer], self.sizes.num_experts
        pool = self._own_pool(layer)
        if not slots:
            gathered.make_streamed(self.overflow[self.sizes.kinds[layer]])
            return
        if pool is None:
            pool = SlotPool(allocate(layer, slots), slots, make_policy(self.policy))
        else:
            self._resize(pool, layer, slots, allocate, in_place=slots == experts)
        gathered.make_streamed(pool)
        if slots < experts:
            return
        missing = [expert for expert in range(experts) if (layer, expert) not in pool]
        ranges = [item for expert in missing for item in self.store.ranges(layer, expert, pool.bank.arrays, expert)]
        files = {item.info.file for item in ranges}
        for file in files:
            self.store.reader.check_unchanged(file)
        fill(self.store.reader, ranges)
        for file in files:
            self.store.reader.check_unchanged(file)
        gathered.make_resident(pool.bank)

    def _own_pool(self, layer: int) -> SlotPool | None:
        """The pool of a layer with slots of its own; a resident layer's bank seen as one."""
        gathered, experts = self.layers[layer], self.sizes.num_experts
        if gathered.pool is not None:
            return None if gathered.pool in self.overflow.values() else gathered.pool
        assert gathered.bank is not None
        pool = SlotPool(gathered.bank, experts, make_policy(self.policy))
        pool.fill({(layer, expert): expert for expert in range(experts)})
        return pool

    @staticmethod
    def _resize(pool: SlotPool, layer: int, slots: int, allocate: AllocateBank, *, in_place: bool = False) -> None:
        """Move a pool to a bank of another size; the policy says which experts are left behind.

        ``in_place`` puts every expert into the slot of its number.
        """
        keys = pool.keys
        while len(keys) > slots:
            keys.remove(pool.policy.victim(keys))
        kept: dict[Key, int] = {key: key[1] if in_place else index for index, key in enumerate(keys)}
        old, bank = pool.bank.arrays, allocate(layer, slots)
        for name, array in bank.arrays.items():
            source, target = (_slots_of(held) for held in (old[name], array))
            for key, slot in kept.items():
                np.copyto(target[slot], source[pool.slot(key)])
        pool.replace(bank, slots, kept)

    def _pools(self) -> list[SlotPool]:
        own = [gathered.pool for gathered in self.layers if gathered.pool is not None]
        return [*{id(pool): pool for pool in (*own, *self.overflow.values())}.values()]


def _slots_of(array: mx.array) -> Any:
    """Bytes of each slot."""
    return bytes_of(array).reshape(array.shape[0], -1)
