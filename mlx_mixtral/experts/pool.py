"""The slots of one bank: which expert lies in which, and who makes room.

A slot is overwritten by threads of the host, while the device may still be computing with what it holds. That this never
happens is guaranteed in one place: every result computed with the bank is handed to ``track``, and ``acquire`` waits for all
of them before it gives a slot away. Most of the time there is nothing to wait for: reading back the router's choice of a layer
has already waited for everything before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import mlx.core as mx

from mlx_mixtral.experts.policy import Policy
from mlx_mixtral.experts.store import Loading
from mlx_mixtral.layers.expert_bank import ExpertBank

__all__ = ["Key", "SlotPool"]

Key = tuple[int, int]
"""Layer and expert: layers may share a pool."""


class SlotPool:
    """``size`` slots of ``bank`` in unified memory."""

    def __init__(self, bank: ExpertBank, size: int, policy: Policy) -> None:
        self.bank, self.size, self.policy = bank, size, policy
        self._slot_of: dict[Key, int] = {}
        self._free = list(range(size - 1, -1, -1))
        self._pending: list[mx.array] = []
        self.prefetched: dict[Key, Loading] = {}
        """Experts on their way into a slot that nobody has asked for yet."""
        self.has_prefetched = False
        """Whether experts were prefetched, or found to be there, since the last call."""

    def __contains__(self, key: object) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        """Experts held."""
        return len(self._slot_of)

    @property
    def keys(self) -> list[Key]:
        """Experts held, in no particular order."""
        return list(self._slot_of)

    def slot(self, key: Key) -> int:
        """Where an expert lies."""
        return self._slot_of[key]

    def touch(self, keys: Iterable[Key]) -> None:
        """Tell the policy that experts are used."""
        for key in keys:
            self.policy.touch(key)

    def acquire(self, keep: Collection[Key]) -> int | None:
        """A slot that nothing uses, taken from an expert outside ``keep`` if none is free; None when there is none.

        The slot belongs to the caller, who hands it to ``put`` or ``release``.
        """
        if self._free:
            self.wait()
            return self._free.pop()
        candidates = [key for key in self._slot_of if key not in keep]
        if not candidates:
            return None
        victim = self.policy.victim(candidates)
        self.wait()
        self.policy.forget(victim)
        return self._slot_of.pop(victim)

    def put(self, key: Key, slot: int) -> None:
        """An expert is complete in a slot of ``acquire``."""
        self._slot_of[key] = slot
        self.policy.touch(key)

    def release(self, slot: int) -> None:
        """A slot of ``acquire`` holds nothing."""
        self._free.append(slot)

    def track(self, result: mx.array) -> None:
        """``result`` is computed from the bank, sooner or later."""
        self._pending.append(result)

    def wait(self) -> None:
        """Wait for everything that was computed from the bank."""
        if self._pending:
            mx.eval(self._pending)
            self._pending.clear()

    def finish_prefetched(self) -> list[Key]:
        """Experts that were read ahead, now in their slots; a failed read is as if it had never been tried."""
        finished = []
        for key, loading in self.prefetched.items():
            if loading.wait() is None:
                self.put(key, loading.slot)
                finished.append(key)
            else:
                self.release(loading.slot)
        self.prefetched.clear()
        return finished

    def fill(self, slots: Mapping[Key, int]) -> None:
        """Experts that lie in slots from the beginning; those named first make room first."""
        for key, slot in slots.items():
            self._free.remove(slot)
            self.put(key, slot)

    def replace(self, bank: ExpertBank, size: int, kept: dict[Key, int]) -> None:
        """Go on with another bank, in which the experts ``kept`` already lie in the slots named."""
        for key in self._slot_of.keys() - kept.keys():
            self.policy.forget(key)
        self.bank, self.size, self._slot_of = bank, size, dict(kept)
        taken = set(kept.values())
        self._free = [slot for slot in range(size - 1, -1, -1) if slot not in taken]
