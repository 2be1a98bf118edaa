"""What constraints cost on the CPU: compiling schemas, masks and accepted tokens over Mixtral's own vocabulary of 32,000.

    python tests/benchmarks/constraints.py [--schemas 300] [--tokens 200]

Texts are drawn evenly from the masks, which meets more of a grammar than a model does. Times are those of one thread (CPU time,
where the system counts it in nanoseconds); beside each figure stands its goal.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from mlx_mixtral.constraints.base import mask_words
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.specs import JsonSchema
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.tokenizer import load_tokenizer
from tests.constraints.support import make_schema
from tests.tokenizer.support import MODELS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(MODELS["v1"], Path(folder) / "tokenizer.model")
        tokenizer = load_tokenizer(folder)
    started = time.process_time()
    table = TokenTable(tokenizer)
    print(f"table of {table.size} tokens: {(time.process_time() - started) * 1e3:.0f} ms, once for a model")
    compiler = Compiler(table)
    compiles, masks, accepts, forks = [], [], [], []
    row = np.zeros(mask_words(table.size), np.int32)
    for seed in range(given.schemas):
        spec = JsonSchema(make_schema(seed))
        started = time.process_time()
        compiled = compiler.compile(spec)
        compiles.append(time.process_time() - started)
        constraint, chance = compiled.begin(max(given.tokens, compiled.min_tokens or 0)), random.Random(seed)
        for _ in range(given.tokens):
            if constraint.is_complete:
                break
            started = time.thread_time()
            constraint.mask_into(row)
            masks.append(time.thread_time() - started)
            ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            started = time.thread_time()
            constraint.accept(int(chance.choice(ids)))
            accepts.append(time.thread_time() - started)
            started = time.thread_time()
            constraint.fork()
            forks.append(time.thread_time() - started)
    print(f"{given.schemas} schemas, {len(masks)} tokens\n")
    print("                        mean      p50      p99      max   goal")
    show("compile, ms", compiles, 1e3, "p99 <= 15")
    show("mask, µs", masks, 1e6, "mean <= 60, p99 <= 500")
    show("accept, µs", accepts, 1e6, "-")
    show("fork, µs", forks, 1e6, "-")


def show(name: str, seconds: list[float], scale: float, goal: str) -> None:
    values = np.array(seconds) * scale
    figures = "".join(f"{value:9.1f}" for value in (values.mean(), *np.percentile(values, (50, 99)), values.max()))
    print(f"{name:20}{figures}   {goal}")


if __name__ == "__main__":
    main()
