"""Logits with some of the experts on disk against logits with all in memory, bit by bit.

    python tests/benchmarks/identity.py FOLDER [FOLDER ...] [--shares 0.75 0.5 0.25 0]

Prefill, decode steps and a padded batch with a step of its own, on fixed tokens. The exit status is 1 if one bit differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from budgets import budget_of

from mlx_mixtral import Mixtral, load

PADDING = [0, 2, 5, 6]


def outputs(model: Mixtral, prompt_tokens: int, steps: int) -> dict[str, bytes]:
    """Logits of every kind of call, as bytes."""
    generator = np.random.default_rng(0)
    vocab_size = model.config.vocab_size

    def tokens(*shape: int) -> mx.array:
        return mx.array(generator.integers(3, vocab_size, shape), mx.int32)

    def bits(logits: mx.array) -> bytes:
        return np.asarray(logits).tobytes()

    cache = model.make_cache()
    found = {"prefill": bits(model.module(tokens(1, prompt_tokens), cache))}
    found["decode"] = b"".join(bits(model.module(tokens(1, 1), cache)) for _ in range(steps))
    cache = model.make_cache(left_padding=PADDING)
    found["batch prefill"] = bits(model.module(tokens(len(PADDING), 9), cache))
    found["batch decode"] = b"".join(bits(model.module(tokens(len(PADDING), 1), cache)) for _ in range(steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    is_same = True
    for folder in arguments.folders:
        with load(folder) as whole:
            wanted = outputs(whole, arguments.prompt, arguments.tokens)
            budgets = [budget_of(whole.engine.planner, share) for share in arguments.shares]
        for share, budget in zip(arguments.shares, budgets, strict=True):
            with load(folder, memory=budget) as model:
                got = outputs(model, arguments.prompt, arguments.tokens)
                residency = model.residency
                print(
                    f"{folder} {share:.0%}: slots {residency.slots}, "
                    f"{residency.hits} hits, {residency.misses} misses; logits",
                    ", ".join(f"{kind} {'identical' if got[kind] == wanted[kind] else 'DIFFER'}" for kind in wanted),
                    flush=True,
                )
                is_same = is_same and got == wanted and residency.misses > 0
    sys.exit(not is_same)


if __name__ == "__main__":
    main()
