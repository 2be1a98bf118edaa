"""What one decode step costs beside arithmetic: GPU kernels per layer, and Python's time per token; ours beside mlx-lm's.

    python tests/benchmarks/steps.py [--layers 32] [--repeats 7] [--json]

Kernels are counted in the graph of a step in float16, 4-bit weights, at batches of 1 and 8: a call of ``mx.fast`` is one, a
view none, a fused group one (``tests/kernels.py``). Python's time is the main thread's own, from a token to the lazy next one,
of a model of 32 layers with tiny matrices; the device's work runs on another thread and is not in it. Our step is compiled, as
it is on GPUs; the line below it is the same step uncompiled, as on the CPU backend.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import mlx_mixtral.runtime.load as runtime_load
from mlx_mixtral import Mixtral, load
from mlx_mixtral.layers.linear import MLX
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral_convert import Recipe, convert

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernels import kernels

PROMPT = [1, 2, 3]
STEPS = 30
make_checkpoint.SHAPES["thin"] = make_checkpoint._WIDE | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
}

Next = Callable[[mx.array], mx.array]
"""From tokens ``[B, 1]`` to lazy logits of the next."""


def ours(model: Mixtral, rows: int = 1, *, compiled: bool = True) -> Next:
    cache, step = model.make_cache(), DecodeStep(model.module, compiled=compiled)
    mx.eval(model.module(mx.array([PROMPT] * rows), cache), cache.arrays, cache.lengths)
    return lambda tokens: step(tokens, cache)


def theirs(network: Any, rows: int = 1) -> Next:
    cache = make_prompt_cache(network)
    mx.eval(network(mx.array([PROMPT] * rows), cache=cache), [layer.state for layer in cache])
    return lambda tokens: network(tokens, cache=cache)  # type: ignore[no-any-return]


def kernels_a_layer(layers: Any, make: Callable[[], Next], rows: int) -> Counter[str]:
    """Of the difference between a model of three layers and one of two; ``layers`` is its list, cut and restored."""
    everything, found = list(layers), []
    for count in (2, 3):
        layers[:] = everything[:count]
        found.append(kernels(lambda: make()(mx.array([[5]] * rows))))
    layers[:] = everything
    return found[1] - found[0]


def python_seconds(following: Next) -> float:
    """The main thread's time per token, up to the lazy next one."""
    token, spent = mx.array([[5]]), 0.0
    for step in range(STEPS + 3):
        started = time.thread_time()
        token = mx.argmax(following(token)[:, -1], axis=-1)[:, None]
        if step >= 3:  # the first ones trace and compile
            spent += time.thread_time() - started
        mx.eval(token)
    return spent / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # The graph that GPUs are given, wherever this runs.
    runtime_load.products_for = lambda device: MLX
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder, "source"), Path(folder, "4bit")
        make_checkpoint.make("thin", source, layers=args.layers)
        convert(source, packed, recipe=Recipe(bits=4, group_size=32))
        counting, model = load(packed, dtype="float16"), load(packed)
        network, single = (load_model(packed)[0] for _ in "ab")
    network.set_dtype(mx.float16)
    single.set_dtype(mx.float32)
    result: dict[str, Any] = {"layers": args.layers, "kernels": {}}
    for rows in (1, 8):
        sides = (
            kernels_a_layer(counting.module.layers, lambda rows=rows: ours(counting, rows), rows),  # type: ignore[misc]
            kernels_a_layer(network.layers, lambda rows=rows: theirs(network, rows), rows),  # type: ignore[misc]
        )
        totals = [side.total() for side in sides]
        result["kernels"][rows] = {"ours": dict(sides[0]), "mlx_lm": dict(sides[1])}
        print(f"kernels per layer, batch {rows}: ours {totals[0]}, mlx-lm {totals[1]}, {totals[0] / totals[1]:.2f}x")
        print("    ours  ", ", ".join(f"{count} {name}" for name, count in sorted(sides[0].items())))
        print("    mlx-lm", ", ".join(f"{count} {name}" for name, count in sorted(sides[1].items())))
    times: dict[str, list[float]] = {"ours": [], "ours uncompiled": [], "mlx-lm": []}
    for _ in range(args.repeats):
        times["ours"].append(python_seconds(ours(model)))
        times["ours uncompiled"].append(python_seconds(ours(model, compiled=False)))
        times["mlx-lm"].append(python_seconds(theirs(single)))
    medians = {side: statistics.median(values) for side, values in times.items()}
    result["python_seconds"] = medians
    print(f"Python's time per token, {args.layers} layers, medians of {args.repeats}:")
    for side, seconds in medians.items():
        low, high = min(times[side]), max(times[side])
        ratio = seconds / medians["mlx-lm"]
        print(f"    {side:<16}{1e3 * seconds:7.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f})  {ratio:.2f}x of mlx-lm")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
