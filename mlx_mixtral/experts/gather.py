"""A layer's experts wherever they are: all in memory, or some of them on disk until a token needs them.

A resident layer is one call of its bank and never waits. A streamed one reads the router's choice back once a call, for all
rows; experts that are in slots compute while the others are read. When a call needs more experts than there are slots they take
turns: each is read once, and half of the slots are being read while the other half compute.

The result does not depend on how much is resident. Each token-expert pair is a product of its own, and which kernel computes
it is chosen by the model's number of experts and the pairs of the whole call, never by the slots there are.
"""

from __future__ import annotations

from collections import deque

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.experts.pool import Key, SlotPool
from mlx_mixtral.experts.store import Counters, ExpertStore, Loading
from mlx_mixtral.layers.adapted_experts import ExpertChanges, PairChanges, changes_of_pairs
from mlx_mixtral.layers.expert_bank import ExpertBank, token_rows
from mlx_mixtral.layers.linear import Products

__all__ = ["GatheredExperts", "Prefetch"]

# Results of larger calls are waited for rather than kept alive until the next one.
KEPT_PAIRS = 64
Indices = npt.NDArray[np.int64]


class GatheredExperts(Module):
    """Experts of layer ``layer``: resident in ``bank``, or in the slots of ``pool`` and on disk.

    A layer has a pool of its own, or shares one with layers whose experts have the same shapes.
    """

    def __init__(self, layer: int, num_experts: int, store: ExpertStore, bank: ExpertBank | None = None) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, num_experts
        self.bank = bank
        self._store = store
        self._pool: SlotPool | None = None
        self._adapted: dict[int, ExpertChanges] = {}

    @property
    def adapted(self) -> dict[int, ExpertChanges]:
        """What adapters make of the experts, by their numbers."""
        return self._adapted

    @property
    def products(self) -> Products:
        """Who multiplies."""
        assert self.bank is not None
        return self.bank.products

    @property
    def pool(self) -> SlotPool | None:
        """The slots of a streamed layer, None for a resident one."""
        return self._pool

    @property
    def counters(self) -> Counters:
        """What streaming did so far, in all layers together."""
        return self._store.counters

    def make_resident(self, bank: ExpertBank) -> None:
        """All experts lie in ``bank``, each in the slot of its number."""
        self.bank, self._pool = bank, None

    def make_streamed(self, pool: SlotPool) -> None:
        """Experts are read into the slots of ``pool`` when they are needed."""
        self.bank, self._pool = pool.bank, pool

    def __call__(
        self,
        x: mx.array,
        selected_experts: mx.array,
        num_experts: int,
        ahead: Prefetch | None = None,
        choice: AdapterChoice = None,
    ) -> tuple[mx.array, mx.array | None]:
        """Each token through each of its experts: ``x [B, L, D]``, ``selected_experts [B, L, K]`` give ``[B, L, K, D]``.

        The second result is what adapters add to the first; None where they add nothing.

        Raises:
            CheckpointError: an expert cannot be read.
        """
        if self._pool is None:
            assert self.bank is not None
            return self.bank.outputs(x, selected_experts, num_experts, choice, self._adapted)
        chosen = self._read_back(selected_experts, ahead)
        return _Call(self, self._pool, self._store, x, chosen, selected_experts.shape, choice).run()

    def _read_back(self, selected_experts: mx.array, ahead: Prefetch | None) -> Indices:
        """The router's choice ``[P]`` on the host: the only synchronisation of a layer."""
        self._store.counters.readbacks += 1
        if ahead is not None:
            mx.eval(selected_experts, ahead.predicted)
            ahead.begin(self._store)
        else:
            mx.eval(selected_experts)
        return np.asarray(selected_experts).reshape(-1).astype(np.int64)


class Prefetch:
    """Experts that a layer will probably need, judged one layer early, and reading them before they are asked for."""

    def __init__(self, experts: GatheredExperts, predicted: mx.array) -> None:
        self._experts, self.predicted = experts, predicted

    def begin(self, store: ExpertStore) -> None:
        """Start to read those that are missing; failures are left for the real read to report."""
        pool, layer = self._experts.pool, self._experts.layer
        if pool is None or pool.prefetched:
            return
        pool.has_prefetched = True
        keys = [(layer, int(expert)) for expert in dict.fromkeys(np.asarray(self.predicted).reshape(-1).tolist())]
        for key in keys:
            if key in pool:
                continue
            if (slot := pool.acquire(keys)) is None:
                return
            try:
                pool.prefetched[key] = store.start(*key, pool.bank.arrays, slot)
            except CheckpointError:
                pool.release(slot)
                return
            store.counters.predicted += 1


class _Call:
    """One call of a streamed layer: groups of experts that are ready compute while others are read."""

    def __init__(
        self,
        experts: GatheredExperts,
        pool: SlotPool,
        store: ExpertStore,
        x: mx.array,
        chosen: Indices,
        shape: tuple[int, ...],
        choice: AdapterChoice,
    ) -> None:
        self.layer, self.num_experts = experts.layer, experts.num_experts
        self.choice, self.adapted = choice, experts.adapted
        self.pool, self.store = pool, store
        self.x, self.chosen, self.shape = x, chosen, shape
        self.is_sorted = pool.bank.sorts(shape, experts.num_experts)
        self.loading: dict[int, Loading] = {}
        self.outputs: list[tuple[mx.array, mx.array | None]] = []
        self.order: list[Indices] = []

    def run(self) -> tuple[mx.array, mx.array | None]:
        pool, counters = self.pool, self.store.counters
        # Reading back has waited for all of it, but for results nobody asked for.
        pool.wait()
        needed = list(dict.fromkeys(self.chosen.tolist()))
        hits = [expert for expert in needed if self._key(expert) in pool]
        misses = deque(expert for expert in needed if self._key(expert) not in pool)
        counters.hits += len(hits)
        counters.misses += len(misses)
        pool.touch(map(self._key, hits))
        if pool.has_prefetched:
            pool.has_prefetched = False
            counters.predicted_needed += len(misses)
        try:
            result = self._take_turns(hits, misses)
            pool.finish_prefetched()
        except BaseException:
            self._abandon()
            raise
        if len(self.chosen) > KEPT_PAIRS:
            pool.wait()
        return result

    def _take_turns(self, hits: list[int], misses: deque[int]) -> tuple[mx.array, mx.array | None]:
        pool = self.pool
        for expert in [expert for expert in misses if self._key(expert) in pool.prefetched]:
            self.loading[expert] = pool.prefetched.pop(self._key(expert))
            misses.remove(expert)
            self.store.counters.predicted_right += 1
        half = -(-pool.size // 2)
        fits = len(hits) + len(misses) + len(self.loading) <= pool.size
        self._begin(misses, hits, pool.size if fits or hits else half)
        if hits:
            self._compute(hits)
        while self.loading or misses:
            if not self.loading:
                self._begin(misses, [], half)
            first = next(iter(self.loading))
            if not self.is_sorted and not self.loading[first].is_done:
                self._compute_in_halves(first, misses)
                continue
            ready = self._finish()
            # The slots of the group before are free once it is computed, which it had the time of these reads for.
            self._begin(misses, ready, pool.size)
            self._compute(ready)
        return self._assembled()

    def _begin(self, misses: deque[int], keep: list[int], limit: int) -> None:
        """Start to read misses, at most ``limit`` at a time, into slots whose experts are not in ``keep``."""
        kept = {self._key(expert) for expert in keep}
        while misses and len(self.loading) < limit:
            slot = self.pool.acquire(kept)
            if slot is None:
                if not self.pool.prefetched:
                    return
                self.pool.finish_prefetched()
                continue
            expert = misses.popleft()
            try:
                self.loading[expert] = self.store.start(self.layer, expert, self.pool.bank.arrays, slot)
            except BaseException:
                self.pool.release(slot)
                raise

    def _finish(self) -> list[int]:
        """Wait for experts that are being read: for all of them in a long call, else for the first and what came with it."""
        waited = list(self.loading) if self.is_sorted else list(self.loading)[:1]
        problem = self.store.finish([self.loading[expert] for expert in waited])
        if problem is not None:
            raise problem
        ready = [expert for expert, loading in self.loading.items() if expert in waited or loading.is_done]
        if (
            problem := self.store.finish([self.loading[expert] for expert in ready if expert not in waited])
        ) is not None:
            raise problem
        for expert in ready:
            self.pool.put(self._key(expert), self.loading.pop(expert).slot)
        return ready

    def _compute_in_halves(self, expert: int, misses: deque[int]) -> None:
        """Start the products of an expert still being read: gate and up as soon as they are there, then down.

        The same kernels on the same rows as in one go, so the same bits.
        """
        loading, bank = self.loading[expert], self.pool.bank
        if (problem := self.store.finish_gate_up(loading)) is not None:
            raise problem
        self._begin(misses, [], self.pool.size)
        pairs = np.flatnonzero(self.chosen == expert)
        slots = mx.array(np.full(len(pairs), loading.slot, np.uint32))
        changes = self._changes(pairs)
        inner = bank.inner(self._rows(pairs), slots, changes, is_sorted=False)
        # Until the rest is there nothing but ``inner`` reads this slot, and the threads write to none of what it reads.
        self._start(inner)
        if (problem := self.store.finish([loading])) is not None:
            raise problem
        self.pool.put(self._key(expert), self.loading.pop(expert).slot)
        self._keep(*bank.outer(inner, slots, changes, is_sorted=False), pairs)

    def _abandon(self) -> None:
        """After a failure: no thread writes any more, and what it wrote counts as nothing."""
        for loading in self.loading.values():
            loading.wait()
            self.pool.release(loading.slot)
        self.loading.clear()
        self.pool.finish_prefetched()
        self.pool.wait()

    def _compute(self, experts: list[int]) -> None:
        """Start the products of all pairs of these experts."""
        pairs = np.flatnonzero(np.isin(self.chosen, experts))
        slot_of = np.zeros(self.num_experts, np.uint32)
        slot_of[experts] = [self.pool.slot(self._key(expert)) for expert in experts]
        slots, bank = slot_of[self.chosen[pairs]], self.pool.bank
        change = None
        if len(pairs) == len(self.chosen) and (self.choice is None or not self.adapted):
            y = bank(self.x, mx.array(slots.reshape(self.shape)), self.num_experts)
            y = y.reshape(len(pairs), -1)
        else:
            count = len(pairs)
            if self.is_sorted:
                order = np.argsort(slots, kind="stable")
                pairs, slots = pairs[order], slots[order]
                # As many rows as the grouped kernel asks for: on GPUs a part of the call takes the path of the whole.
                is_gpu = mx.default_device().type == mx.DeviceType.gpu
                missing = max(0, max(16, 4 * self.pool.size) - count) if is_gpu else 0
                filler = np.concatenate([np.arange(count), np.full(missing, count - 1)])
            else:
                filler = np.arange(count)
            filled = pairs[filler]
            y, change = bank.pairs(
                self._rows(filled), mx.array(slots[filler]), self._changes(filled), is_sorted=self.is_sorted
            )
            y, change = y[:count], None if change is None else change[:count]
        self._keep(y, change, pairs)

    def _changes(self, pairs: Indices) -> PairChanges | None:
        """What adapters change of these pairs."""
        experts = self.chosen[pairs]
        return changes_of_pairs(self.choice, self.adapted, experts, pairs, self.shape, is_sorted=self.is_sorted)

    def _rows(self, pairs: Indices) -> mx.array:
        """The tokens ``[P, 1, D]`` of token-expert pairs."""
        return token_rows(self.x, mx.array(pairs // self.shape[-1]))

    def _start(self, result: mx.array) -> None:
        self.pool.track(result)
        mx.async_eval(result)

    def _keep(self, y: mx.array, change: mx.array | None, pairs: Indices) -> None:
        self._start(y)
        if change is not None:
            self._start(change)
        self.outputs.append((y, change))
        self.order.append(pairs)

    def _assembled(self) -> tuple[mx.array, mx.array | None]:
        """The groups' results in the order of the call."""
        ys, changes = [y for y, _ in self.outputs], [change for _, change in self.outputs]
        if all(change is None for change in changes):
            return self._in_order(ys), None
        there = [mx.zeros_like(y) if change is None else change for y, change in self.outputs]
        return self._in_order(ys), self._in_order(there)

    def _in_order(self, parts: list[mx.array]) -> mx.array:
        shape, order = (*self.shape, self.x.shape[-1]), np.concatenate(self.order)
        if len(parts) == 1 and (order == np.arange(len(order))).all():
            return parts[0].reshape(shape)
        return mx.concatenate(parts)[mx.array(np.argsort(order))].reshape(shape)

    def _key(self, expert: int) -> Key:
        return (self.layer, expert)
