"""Memory and time of rows of unequal length: one array for all, an array a row, or groups by length, as batches have them.

    python tests/benchmarks/rows.py [--rows 500x7,16384] [--steps 30] [--layers 8] [--json]
    python tests/benchmarks/rows.py --before FOLDER

The cache is filled with zeros, which cost what keys cost. A tiny width leaves attention and the cache nearly alone: a layer
has two heads of 32 numbers and experts of width 64. ``--rows`` are tokens of each row, ``NxR`` for R rows of N. Each way is
measured in a process of its own: bytes of the cache, MLX's peak while rows join one by one, kernels and time of a step; then
the same for 8 rows of equal length. ``--before`` gives the scheduler's step of these for the package in another folder too, an
older version of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SPREADS: dict[str, float | None] = {"one array": float("inf"), "a row each": None, "groups": 2.0}
EQUAL = "300x8"


def lengths(text: str) -> list[int]:
    """Tokens of every row."""
    found = []
    for part in text.split(","):
        tokens, _, rows = part.partition("x")
        found += [int(tokens)] * int(rows or 1)
    return found


def model_in(folder: Path, layers: int) -> Any:
    """A tiny model with a context of 32k tokens."""
    import mlx.core as mx

    # Behind PYTHONPATH, which may name another version of the package.
    sys.path.append(str(Path(__file__).parents[2]))
    from mlx_mixtral import load
    from tests.shared import random_checkpoint

    mx.set_default_device(mx.cpu)
    random_checkpoint(
        folder,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    )
    return load(folder)


def joined(model: Any, rows: list[int], spread: float | None) -> dict[str, Any]:
    """A cache of rows that came one by one, and its steps."""
    import mlx.core as mx

    from mlx_mixtral.cache.batch import BatchCache
    from mlx_mixtral.model.step import DecodeStep
    from tests.kernels import kernels

    empty = model.make_cache()
    batch = BatchCache(empty.storage, empty.window, spread=spread)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for tokens in rows:
        cache = model.make_cache()
        cache.reserve(1, tokens)
        cache.advance(tokens)
        batch.join(cache, [(0, tokens)])
    peak = mx.get_peak_memory() - before
    step = DecodeStep(model.module, compiled=False)
    tokens = mx.full((len(rows), 1), 5, mx.int32)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        mx.eval(step(tokens, batch))
        times.append(time.perf_counter() - started)
    nbytes = batch.nbytes
    # Last: it leaves a graph of stand-ins in the cache.
    count = sum(kernels(lambda: step(tokens, batch)).values())
    return {
        "bytes": nbytes,
        "peak": peak,
        "held": sum(rows) * model.config.kv_bytes_per_token(4),
        "step_ms": statistics.median(times) * 1000,
        "kernels": count,
    }


STEPS = 30


def equal_step_ms(model: Any, steps: int) -> dict[str, float]:
    """A step of 8 rows of one length by the scheduler itself, in whatever version of the package this is.

    The median, the quickest, and the processor's time in all threads, which a busy machine changes least.
    """
    import mlx.core as mx

    from mlx_mixtral import SamplingParams
    from mlx_mixtral.generation.request import Request
    from mlx_mixtral.generation.sampling import Sampler

    engine = model.engine
    times, busy = [], []
    with engine.running():
        scheduler = engine.scheduler(8)
        for seed, tokens in enumerate(lengths(EQUAL)):
            prompt = [3 + (seed * 31 + i * 7) % 200 for i in range(tokens)]
            scheduler.submit(Request(prompt, steps + 40, Sampler(SamplingParams(), prompt, engine.vocab_size)))
        while not scheduler.is_idle:
            started, worked = time.perf_counter(), time.process_time()
            if len(scheduler.step()) == 8:
                times.append(time.perf_counter() - started)
                busy.append(time.process_time() - worked)
        mx.synchronize()
    return {
        "median": statistics.median(times[5:-5]) * 1000,
        "least": min(times[5:-5]) * 1000,
        "processor": statistics.median(busy[5:-5]) * 1000,
    }


def run(arguments: list[str], package: Path) -> Any:
    """This script's result in a process of its own, with the package of another folder."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    out = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="500x7,16384")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    global STEPS
    STEPS = given.steps
    if given.one is not None:
        with tempfile.TemporaryDirectory() as folder, model_in(Path(folder) / "model", given.layers) as model:
            done = (
                equal_step_ms(model, given.steps)
                if given.one == "equal"
                else joined(model, lengths(given.rows), SPREADS[given.one])
            )
        print(json.dumps(done))
        return
    here = Path(__file__).parents[2]
    shared = ["--steps", str(given.steps), "--layers", str(given.layers)]
    result: dict[str, Any] = {
        rows: {name: run(["--one", name, "--rows", rows, *shared], here) for name in SPREADS}
        for rows in (given.rows, EQUAL)
    }
    result["scheduler"] = {"now": run(["--one", "equal", *shared], here)}
    if given.before is not None:
        result["scheduler"]["before"] = run(["--one", "equal", *shared], given.before)
    if given.json:
        print(json.dumps(result))
        return
    for rows in (given.rows, EQUAL):
        print(f"rows of {rows} tokens{'':24}cache    of what is held   peak while joining   kernels   a step")
        for name, row in result[rows].items():
            print(
                f"  {name:22}{row['bytes'] / 1e6:14.1f} MB {row['bytes'] / row['held']:15.2f}x {row['peak'] / 1e6:17.1f} MB"
                f" {row['kernels']:9} {row['step_ms']:8.2f} ms"
            )
    for name, row in result["scheduler"].items():
        print(
            f"a step of 8 rows of equal length by the scheduler, {name:7} {row['median']:8.2f} ms, {row['least']:.2f} at best, "
            f"{row['processor']:.2f} of the processor"
        )


if __name__ == "__main__":
    main()
