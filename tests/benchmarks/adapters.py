"""Adapters on a loaded model: the speed of decoding with one, beside mlx-lm with the same, and the time to load one.

    python tests/benchmarks/adapters.py [--shape mid] [--rank 16] [--tokens 64] [--repeats 7]
    python tests/benchmarks/adapters.py --only load [--gigabytes 1]

A synthetic checkpoint of 4 bits and a random LoRA adapter of every matrix of its layers. With and without take turns within one
process, so that both sides of a ratio see the same machine; the least time of each counts. A batch has a row of each of
three adapters and one of none. ``load`` adds an adapter of so many bytes (float32, as mlx-lm writes them; the rank follows) to
a model of 8x7B's width with as many layers as ``--layers``. ``adapter_quality.py`` has what fusing costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_mixtral import Mixtral, load
from mlx_mixtral_convert import Recipe, convert

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.adapters.made import lora

PROMPT = [1, *range(3, 18)]
PARTS = ("attention", "router", "expert")


def ours(model: Mixtral, adapter: str | None, tokens: int) -> float:
    """Seconds a token of a generation by itself."""
    stats = model.generate(PROMPT, adapter=adapter, max_tokens=tokens, stop_token_ids=()).stats
    return 1 / stats.decode_tok_s


def batched(model: Mixtral, adapters: list[str | None], tokens: int) -> float:
    """Seconds a step of a batch, prompts included."""
    started = time.perf_counter()
    each: list[Any] = [{"adapter": name} for name in adapters]
    model.generate_batch([PROMPT] * len(adapters), each=each, max_tokens=tokens)
    return (time.perf_counter() - started) / tokens


def theirs(network: Any, tokens: int) -> float:
    """Seconds a token of mlx-lm's, greedy, each token read before the next, as its generation does one step ahead."""
    cache = make_prompt_cache(network)
    token = mx.argmax(network(mx.array([PROMPT]), cache=cache)[:, -1], axis=-1)
    mx.eval(token)
    started = time.perf_counter()
    for _ in range(tokens):
        following = mx.argmax(network(token[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(following)
        token.item()
        token = following
    token.item()
    return (time.perf_counter() - started) / tokens


def interleaved(repeats: int, **sides: Callable[[], float]) -> dict[str, float]:
    """The least time of each side, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
    return {name: min(times) for name, times in found.items()}


def speed(folder: Path, shape: str, rank: int, tokens: int, repeats: int) -> None:
    made, packed = folder / "made", folder / "packed"
    make_checkpoint.make(shape, made)
    convert(made, packed, recipe=Recipe(bits=4))
    paths = [lora(folder / name, packed, seed=seed, rank=rank, parts=PARTS) for seed, name in enumerate("abc")]
    with load(packed, prefix_cache=0, adapter=paths) as model:
        found = interleaved(
            repeats,
            without=lambda: ours(model, None, tokens),
            adapted=lambda: ours(model, "a", tokens),
            batch_without=lambda: batched(model, [None] * 4, tokens),
            batch_one=lambda: batched(model, ["a"] * 4, tokens),
            batch_mixed=lambda: batched(model, ["a", "b", "c", None], tokens),
        )
        print(
            f"{shape}, rank {rank} on everything, {model.device.name}; adapters of {model.adapters['a'].nbytes} bytes each"
        )
    mx.clear_cache()
    plain, adapted = load_model(packed)[0], load_adapters(load_model(packed)[0], str(paths[0]))
    for network in (plain, adapted):
        network.set_dtype(mx.float32)
        network.eval()
    found |= interleaved(
        repeats, mlx_lm_without=lambda: theirs(plain, tokens), mlx_lm_adapted=lambda: theirs(adapted, tokens)
    )
    for name, base in (
        ("adapted", "without"),
        ("mlx_lm_adapted", "mlx_lm_without"),
        ("batch_one", "batch_without"),
        ("batch_mixed", "batch_without"),
    ):
        ratio = found[base] / found[name]
        print(f"{name:15} {1e3 * found[name]:8.2f} ms, {base:15} {1e3 * found[base]:8.2f} ms: {ratio:.3f}x the speed")


def loading(folder: Path, layers: int, gigabytes: float, repeats: int) -> None:
    made, packed = folder / "wide", folder / "wide-4"
    make_checkpoint.make("wide", made, layers=layers)
    convert(made, packed, recipe=Recipe(bits=4))
    # Numbers of A and B together for each of the rank, of one layer: experts, then q, k, v and o.
    a_rank = 8 * 3 * (4096 + 14336) + 4096 * 2 + 2 * (4096 + 1024) + 2 * 4096
    rank = round(gigabytes * 1e9 / 4 / layers / a_rank)
    adapter = lora(folder / "lora", packed, rank=rank, parts=("attention", "expert"))
    nbytes = (adapter / "adapters.safetensors").stat().st_size
    with load(packed) as model:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            model.adapters.add(adapter)
            times.append(time.perf_counter() - started)
            held = model.adapters["lora"].nbytes
            model.adapters.remove("lora")
    best = min(times)
    print(
        f"an adapter of {nbytes / 1e9:.2f} GB, rank {rank} on {layers} layers of 8x7B's width, {held / 1e9:.2f} GB in memory:"
    )
    print(f"added in {best:.2f} s, {nbytes / best / 1e9:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "load"))
    parser.add_argument("--shape", default="mid", choices=sorted(make_checkpoint.SHAPES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if given.only != "load":
            speed(Path(place), given.shape, given.rank, given.tokens, given.repeats)
        if given.only != "speed":
            loading(Path(place), given.layers, given.gigabytes, min(given.repeats, 3))


if __name__ == "__main__":
    main()
