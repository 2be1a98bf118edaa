"""Hit rates on real text: LRU, LFU and the optimal policy by slots per layer, and what looking ahead finds.

    python tests/benchmarks/routing.py                        the bundled checkpoint
    python tests/benchmarks/routing.py FOLDER --tokens 200 --plot hits.png

The trace is of the held-out texts in tests/goldens; every text starts a sequence of its own. Looking ahead is measured live,
decoding greedily with half of the experts in memory: recall is the share of missing experts it had begun to read, waste the
share of its reads that nobody needed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from budgets import budget_of

from mlx_mixtral import Mixtral, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.evaluation.figures import new_figure, png
from mlx_mixtral.experts.trace import RoutingTrace, hit_rates, simulate
from mlx_mixtral_convert import Recipe, convert

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
POLICIES = ("lru", "lfu", "optimal")
DECODED = 48


def traced(model: Mixtral, tokens: int) -> RoutingTrace:
    texts = [path.read_text(encoding="utf-8")[4000:] for path in sorted(HELD_OUT.glob("*.txt"))]
    return model.routing_trace([model.tokenizer.encode(text[: 8 * tokens])[:tokens] for text in texts])


def table(trace: RoutingTrace) -> dict[str, list[float]]:
    """Mean over the layers of the hit rate with 2 slots, 3 and so on, by policy; ``random`` is what chance would give."""
    slots = range(trace.experts.shape[2], trace.num_experts)
    found: dict[str, list[float]] = {}
    for policy in POLICIES:
        if policy == "lru":
            curves = hit_rates(trace)
            found[policy] = [float(curves[:, count].mean()) for count in slots]
            continue
        rates = []
        for count in slots:
            counts = [
                simulate(trace.experts[:, layer], trace.num_experts, count, policy)
                for layer in range(trace.experts.shape[1])
            ]
            rates.append(float(np.mean([c.hits / (c.hits + c.misses) for c in counts])))
        found[policy] = rates
    return found


def looking_ahead(folder: Path, prompt: list[int]) -> None:
    with load(folder) as whole:
        budget = budget_of(whole.engine.planner, 0.5)
    for mode in ("off", "on"):
        with load(folder, memory=budget, prefetch=mode) as model:
            before = model.residency.counters.copy()
            started = time.perf_counter()
            stats = model.generate(prompt, max_tokens=DECODED).stats
            took = time.perf_counter() - started
            counts = model.residency.counters.since(before)
            line = f"look-ahead {mode}: {stats.decode_tok_s:.1f} tok/s, {took:.1f} s, {counts.bytes_read / 1e6:.1f} MB read"
            if counts.predicted:
                line += (
                    f", recall {counts.predicted_right / max(counts.predicted_needed, 1):.0%} of "
                    f"{counts.predicted_needed} missing, "
                    f"waste {1 - counts.predicted_right / counts.predicted:.0%} of {counts.predicted} reads"
                )
            print(line)


def plot(rates: dict[str, list[float]], first: int, experts: int, path: str, title: str) -> None:
    slots = range(first, experts)
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for policy, values in rates.items():
        axes.plot(slots, values, marker="o", label={"lru": "LRU", "lfu": "LFU", "optimal": "optimal (offline)"}[policy])
    axes.plot(slots, [count / experts for count in slots], "--", color="grey", label="chance (slots / experts)")
    axes.set(xlabel=f"slots per layer, of {experts} experts", ylabel="hit rate", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    Path(path).write_bytes(png(figure, title))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=500, help="of each of the seven texts")
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder
        if folder is None:
            folder = Path(temporary) / "tiny-mixtral"
            convert(checkpoint_path(), folder, recipe=Recipe(4))
        with load(folder) as model:
            trace = traced(model, arguments.tokens)
            prompt = model.tokenizer.encode("In the beginning God created the heaven and the earth.")
        tokens, layers, chosen = trace.experts.shape
        print(f"{folder.name}: {tokens} tokens, {layers} layers, {chosen} of {trace.num_experts} experts per token")
        repeats = trace.repeat_rates
        span = f"{repeats.min():.1%} to {repeats.max():.1%}"
        print(f"tokens that share an expert with the one before: {repeats.mean():.1%} ({span})")
        rates = table(trace)
        slots = range(chosen, trace.num_experts)
        print("| policy | " + " | ".join(f"{count} slots" for count in slots) + " |")
        print("| --- |" + " ---: |" * len(slots))
        for policy, values in rates.items():
            print(f"| {policy} | " + " | ".join(f"{value:.1%}" for value in values) + " |")
        if arguments.plot:
            plot(rates, chosen, trace.num_experts, arguments.plot, f"{folder.name}: experts found in memory")
        looking_ahead(folder, prompt)


if __name__ == "__main__":
    main()
