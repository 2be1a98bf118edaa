"""How good the residency planner's predictions are: its cost model against a simulation, token by token.

python tests/benchmarks/residency.py [--markdown] [--tokens N] [--readback MICROSECONDS]

Nothing here is measured: speeds are published ones, sizes are arithmetic, routing is a made-up trace with the published rates
of repeats. Curves come from one trace, the simulation runs on another. It keeps every bank's contents with the LRU policy
itself and a clock: hits compute while misses load, misses compute when all of them are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from mlx_mixtral.budget.slots import ModelSizes, Speeds, min_expert_bytes, plan_residency  # noqa: E402
from mlx_mixtral.experts.policy import LRU  # noqa: E402
from mlx_mixtral.experts.trace import RoutingTrace, hit_rates, published_trace, simulate  # noqa: E402
from mlx_mixtral.info.estimate import BUILT_IN, WORKING_BYTES, Width, bytes_by_part, expert_bytes  # noqa: E402
from mlx_mixtral.info.macs import find_chips, usable_bytes  # noqa: E402

CONTEXT_TOKENS = 4096
WARM_UP_TOKENS = 200
MODELS = [("8x7b", 3), ("8x7b", 4), ("8x22b", 3), ("8x22b", 4)]

# Share of the published memory bandwidth that decoding reaches: 34.7 tok/s on an M2 Max (llama.cpp #4406), 24.6 GiB of which
# 27.6% take part in a token, are 253 of 400 GB/s.
MEMORY_SHARE = 0.63
# Share of a sequential read's speed that reading experts reaches: an assumption, our goal.
DISK_SHARE = 0.85


@dataclass(frozen=True)
class Mac:
    """A chip, memory, and the read speed of its drive in GB/s, as published."""

    chip: str
    memory_gib: int
    disk_gb_s: float
    source: str


MACS = (
    Mac("M2", 16, 1.45, "256 GB drive, Max Tech (iclarified.com/86732); with 512 GB two chips read in parallel"),
    Mac("M4", 16, 2.03, "512 GB drive, Max Tech, reported by 9to5Mac"),
    Mac("M5", 16, 6.32, "512 GB drive, Max Tech, reported by 9to5Mac"),
    Mac("M2 Pro", 32, 5.37, "2 TB drive, Macworld (macrumors.com/2023/01/24/new-macbook-pro-ssd-speeds)"),
    Mac("M5", 32, 6.32, "512 GB drive, Max Tech, reported by 9to5Mac"),
    Mac("M2 Max", 64, 5.32, "Tom's Guide (macrumors.com/2023/01/24/new-macbook-pro-ssd-speeds)"),
    Mac("M4 Max 40-core", 64, 7.31, "4 TB drive; from The Verge's test of the M5 Max: 13.6 GB/s, 86% more than it"),
    Mac("M4 Max 40-core", 128, 7.31, "4 TB drive; from The Verge's test of the M5 Max: 13.6 GB/s, 86% more than it"),
    Mac("M5 Max 40-core", 128, 13.6, "4 TB drive, The Verge's review of the M5 Max"),
)


def sizes_of(model: str, bits: int) -> ModelSizes:
    config, width = BUILT_IN[model], Width(bits)
    parts, expert = bytes_by_part(config, width), expert_bytes(config, width)
    layers = config.num_hidden_layers
    trunk = sum(nbytes for part, nbytes in parts.items() if part != "expert")
    per_layer = (expert,) * layers
    return ModelSizes(trunk, per_layer, per_layer, (0,) * layers, config.num_local_experts, config.num_experts_per_tok)


class Simulation:
    """Banks and a clock."""

    def __init__(self, sizes: ModelSizes, speeds: Speeds, slots: Sequence[int], overflow: Mapping[int, int]) -> None:
        self.sizes, self.speeds = sizes, speeds
        shared = {kind: Bank(count) for kind, count in overflow.items()}
        self.banks = [
            None if count == sizes.num_experts else Bank(count) if count else shared[kind]
            for count, kind in zip(slots, sizes.kinds, strict=True)
        ]
        self.misses = 0

    def token(self, chosen: Sequence[Sequence[int]]) -> float:
        """Seconds of one token with the experts ``chosen`` in each layer."""
        clock = self.sizes.trunk_bytes / self.speeds.memory_bytes_per_s
        for layer, (bank, needed) in enumerate(zip(self.banks, chosen, strict=True)):
            compute = self.sizes.expert_bytes[layer] / self.speeds.memory_bytes_per_s
            if bank is None:
                clock += len(needed) * compute
                continue
            clock += self.speeds.readback_s
            missing = bank.missing([(layer, expert) for expert in needed])
            self.misses += missing
            loaded = clock + missing * self.sizes.expert_file_bytes[layer] / self.speeds.disk_bytes_per_s
            clock = max(clock + (len(needed) - missing) * compute, loaded) + missing * compute
        return clock


class Bank:
    """The contents of some slots, and who makes room."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held, self.policy = slots, set[tuple[int, int]](), LRU()

    def missing(self, needed: list[tuple[int, int]]) -> int:
        """Make all of ``needed`` present; how many were not."""
        absent = [key for key in needed if key not in self.held]
        for key in absent:
            if len(self.held) == self.slots:
                self.held.remove(self.policy.victim(self.held.difference(needed)))
            self.held.add(key)
        for key in needed:
            self.policy.touch(key)
        return len(absent)


def simulated_tok_s(
    sizes: ModelSizes, speeds: Speeds, slots: Sequence[int], overflow: Mapping[int, int], trace: RoutingTrace
) -> float:
    simulation = Simulation(sizes, speeds, slots, overflow)
    seconds = [simulation.token(token) for token in trace.experts.tolist()][WARM_UP_TOKENS:]
    return len(seconds) / sum(seconds)


def concentrated(sizes: ModelSizes, room: int) -> tuple[list[int], dict[int, int]]:
    """As many layers as fit are resident, the others share."""
    layers, experts = len(sizes.kinds), sizes.num_experts
    whole = min((room - min_expert_bytes(sizes)) // (experts * sizes.expert_bytes[0]), layers - 1)
    return [experts] * whole + [0] * (layers - whole), {0: sizes.num_experts_per_tok}


def spread(sizes: ModelSizes, room: int) -> tuple[list[int], dict[int, int]]:
    """Equal slots for all layers, one more for as many as it is enough for."""
    layers = len(sizes.kinds)
    each, more = divmod(room // sizes.expert_bytes[0], layers)
    slots = [each + 1] * more + [each] * (layers - more)
    few = [0 if count < sizes.num_experts_per_tok else count for count in slots]
    if 0 not in few:
        return few, {}
    few = [0] * layers  # slots of layers that cannot have a bank of their own go to the others
    left = room - min_expert_bytes(sizes)
    for layer in range(layers):
        if left >= sizes.num_experts_per_tok * sizes.expert_bytes[layer]:
            few[layer], left = sizes.num_experts_per_tok, left - sizes.num_experts_per_tok * sizes.expert_bytes[layer]
    return few, {0: sizes.num_experts_per_tok} if 0 in few else {}


HEAD = (
    "Mac", "model", "experts in memory", "resident layers", "slots of the others", "hit rate", "read GB/token",
    "time for disk, read-backs",
    "predicted tok/s", "simulated", "ratio", "concentrated", "spread", "random routing",
)  # fmt: skip


def row(mac: Mac, model: str, bits: int, options: argparse.Namespace) -> tuple[str, ...]:
    sizes, config = sizes_of(model, bits), BUILT_IN[model]
    layers, experts, per_token = len(sizes.kinds), sizes.num_experts, sizes.num_experts_per_tok
    (chip,) = find_chips(mac.chip)
    speeds = Speeds(mac.disk_gb_s * 1e9 * DISK_SHARE, chip.bandwidth_gb_s * 1e9 * MEMORY_SHARE, options.readback * 1e-6)
    kv_bytes = CONTEXT_TOKENS * config.kv_bytes_per_token()
    room = usable_bytes(mac.memory_gib) - sizes.trunk_bytes - kv_bytes - WORKING_BYTES
    plan = plan_residency(sizes, room, speeds, hit_rates(published_trace(layers, experts, per_token)))
    name = (f"{mac.chip}, {mac.memory_gib} GB", f"{model} {bits}-bit")
    held = min(room / (sum(sizes.expert_bytes) * experts), 1.0)
    if not plan.readbacks_per_token:
        return (*name, "all", str(layers), "", "100%", "0", "", f"{plan.tok_s:.2f}", *[""] * 5)
    seen = published_trace(layers, experts, per_token, options.tokens + WARM_UP_TOKENS, seed=1)
    order = np.random.default_rng(2).random((*seen.experts.shape[:2], experts)).argsort(axis=2)
    chance = RoutingTrace(order[..., :per_token].astype(np.uint16), experts)
    simulated = simulated_tok_s(sizes, speeds, plan.slots, plan.overflow_slots, seen)
    others = sorted({count for count in plan.slots if count < experts})
    return (
        *name,
        f"{held:.0%}",
        f"{plan.slots.count(experts)} of {layers}",
        ", ".join(f"{count} ({plan.slots.count(count)}x)" for count in others),
        f"{1 - plan.misses_per_token / (layers * per_token):.0%}",
        f"{plan.bytes_per_token / 1e9:.2f}",
        f"{plan.disk_s / plan.seconds_per_token:.1%}, {plan.readback_s / plan.seconds_per_token:.1%}",
        f"{plan.tok_s:.2f}",
        f"{simulated:.2f}",
        f"{plan.tok_s / simulated:.3f}",
        f"{simulated_tok_s(sizes, speeds, *concentrated(sizes, room), seen):.2f}",
        f"{simulated_tok_s(sizes, speeds, *spread(sizes, room), seen):.2f}",
        f"{simulated_tok_s(sizes, speeds, plan.slots, plan.overflow_slots, chance):.2f}",
    )


def policy_rows() -> list[tuple[str, ...]]:
    """Hit rates by slots of one layer's bank, mean over the layers of the paper's table."""
    trace, slots = published_trace(32, 8, 2), range(2, 8)
    rows = [("policy", *(f"{count} slots" for count in slots))]
    for name in ("lru", "lfu", "optimal"):
        found = [[simulate(trace.experts[:, layer], 8, count, name) for layer in (0, 15, 31)] for count in slots]
        rates = [sum(counts.hits for counts in each) / sum(sum(counts) for counts in each) for each in found]
        rows.append((name, *(f"{rate:.1%}" for rate in rates)))
    return rows


def show(rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        rows.insert(1, ("---",) * len(rows[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        if markdown:
            print("| " + " | ".join(cells) + " |")
        else:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--readback", type=float, default=300.0)
    options = parser.parse_args()
    show([HEAD, *(row(mac, model, bits, options) for model, bits in MODELS for mac in MACS)], options.markdown)
    drives = dict.fromkeys((mac.chip, f"{mac.disk_gb_s:.2f}", mac.source) for mac in MACS)
    show([("chip", "disk GB/s", "source"), *drives], options.markdown)
    show(policy_rows(), options.markdown)


if __name__ == "__main__":
    main()
