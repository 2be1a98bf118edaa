"""The three rates a plan depends on, measured on the model at hand in a fraction of a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mixtral.budget.slots import Speeds
from mlx_mixtral.experts.store import ExpertStore
from mlx_mixtral.layers.expert_bank import ExpertBank

__all__ = ["measure_speeds"]

DISK_SECONDS = 0.25
MAX_EXPERTS = 32
REPEATS = 5


def measure_speeds(store: ExpertStore, bank: ExpertBank, layers: Sequence[int], x: mx.array) -> Speeds:
    """Measure with a bank of one slot, into which experts of any of ``layers`` fit, and a token ``x [1, D]``.

    Reads experts as generation will, past the page cache unless that is asked for, and computes with the last one read.

    Raises:
        CheckpointError: an expert cannot be read.
    """
    disk = _disk_bytes_per_s(store, bank, layers)
    nbytes = sum(array.nbytes for array in bank.arrays.values())
    slots = mx.zeros(1, mx.uint32)
    compute = _median_seconds(lambda: mx.eval(bank.pairs(x[:, None], slots, is_sorted=False)))
    readback = _median_seconds(lambda: mx.eval(mx.argmax(x + 1.0)))
    return Speeds(disk, nbytes / max(compute - readback, 1e-9), readback)


def _disk_bytes_per_s(store: ExpertStore, bank: ExpertBank, layers: Sequence[int]) -> float:
    """Experts of other layers each time, so that none is read twice while it may be cached in the drive."""
    done, count, started = 0, 0, time.perf_counter()
    elapsed = 0.0
    num_experts = len(store.parts[layers[0]])
    while count < min(MAX_EXPERTS, len(layers) * num_experts) and elapsed < DISK_SECONDS:
        layer, expert = layers[count % len(layers)], count // len(layers)
        loading = store.start(layer, expert, bank.arrays, 0)
        if (problem := loading.wait()) is not None:
            raise problem
        done, count = done + loading.nbytes, count + 1
        elapsed = time.perf_counter() - started
    return done / max(elapsed, 1e-9)


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
