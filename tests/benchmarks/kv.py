"""What keys and values cost: memory of a long prefill in 4 and 16 bits, bytes at 32k tokens, a saved prompt's first token.

    python tests/benchmarks/kv.py [--tokens 8192] [--mlx-lm] [--dtype float32] [--bits 16,4]

``prefill`` and ``context`` are on the skinny shape (8x7B's attention, 4 of its 32 layers, experts of width 64, unquantised),
every run in a process of its own; the peak is MLX's. ``--mlx-lm`` runs its prefill too, in float32, with its plain cache and
with its quantised one from the first token on. On the CPU we compute in float32, so that 16 bits are unpacked as 4 bits are;
``--dtype bfloat16`` has the types of a GPU, and takes several times as long. ``context`` writes 32,768 tokens into the cache
and counts its bytes. ``saved`` is on the mid shape in 4 bits: time to the first token of a prompt of 1,000 tokens and of 8
more after it was loaded from a file, loading included, against computing it. MLX's wheels for Linux carry a plain BLAS that
makes 8,192 tokens a matter of hours: preload another one (``LD_PRELOAD=libblas.so.3`` of OpenBLAS), which changes no memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from make_checkpoint import make
from processes import run_json

from mlx_mixtral import load
from mlx_mixtral_convert import Recipe, convert

DATA = Path(__file__).parents[2] / "bench-data"
CONTEXT, LAYERS_OF_8X7B = 32768, 32


def checkpoint(shape: str, bits: int | None = None) -> Path:
    """The folder of a shape, made when it is not there."""
    plain = DATA / shape
    if not (plain / "config.json").exists():
        make(shape, plain)
    if bits is None:
        return plain
    folder = DATA / f"{shape}-{bits}bit"
    if not folder.exists():
        convert(plain, folder, recipe=Recipe(bits=bits))
    return folder


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 32000, tokens)]


def prefill(folder: Path, bits: int | None, tokens: int, dtype: str) -> dict[str, Any]:
    with load(folder, kv_bits=bits, dtype=dtype, context=tokens + 1) as model:
        mx.reset_peak_memory()
        weights, started = mx.get_active_memory(), time.perf_counter()
        model.generate(prompt(tokens), max_tokens=1)
        return {
            "weights": weights,
            "peak": mx.get_peak_memory(),
            "chunk": model.residency.plan.chunk_tokens,
            "seconds": time.perf_counter() - started,
        }


def prefill_mlx_lm(folder: Path, bits: int | None, tokens: int, _: str) -> dict[str, Any]:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    network, _config = load_model(folder)
    network.set_dtype(mx.float32)
    mx.eval(network.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    weights, started = mx.get_active_memory(), time.perf_counter()
    next(generate_step(mx.array(prompt(tokens)), network, max_tokens=1, kv_bits=bits, quantized_kv_start=0))
    return {"weights": weights, "peak": mx.get_peak_memory(), "seconds": time.perf_counter() - started}


def context(folder: Path, bits: int | None, tokens: int, dtype: str) -> dict[str, Any]:
    """Keys and values of ``tokens`` random tokens in all layers, in the bytes of the arrays that hold them."""
    with load(folder, kv_bits=bits, dtype=dtype) as model:
        config, cache = model.config, model.module.make_cache(max_tokens=tokens)
        piece = mx.random.normal((1, config.num_key_value_heads, 1024, config.head_dim)).astype(model.module.dtype)
        for _ in range(0, tokens, piece.shape[2]):
            step = cache.chunk(1, piece.shape[2])
            for layer in range(config.num_hidden_layers):
                step.enter(layer, piece, piece)
            cache.advance(piece.shape[2])
            mx.eval(cache.arrays)
        return {"length": cache.length, "bytes": cache.nbytes, "layers": config.num_hidden_layers}


TASKS = {"prefill": prefill, "prefill-mlx-lm": prefill_mlx_lm, "context": context}


def show_prefill(tokens: int, dtype: str, bits_of: list[int], *, beside: bool) -> None:
    print(f"prefill of {tokens} tokens, peak of MLX beyond the weights, keys and values in ...")
    # mlx-lm holds what it computes with where it does not quantise.
    theirs = [None if bits == 16 else bits for bits in bits_of]
    for task, kinds in (("prefill", bits_of), ("prefill-mlx-lm", theirs)):
        if task != "prefill" and not beside:
            continue
        results = {bits: run_json(__file__, "--one", task, bits or 0, tokens, dtype) for bits in kinds}
        base = next(iter(results.values()))
        for bits, result in results.items():
            beyond = result["peak"] - result["weights"]
            print(
                f"  {'mlx-lm ' if beside and task != 'prefill' else ''}{bits or 'compute type'}: {beyond / 1e6:.0f} MB, "
                f"{beyond / (base['peak'] - base['weights']):.2f}x of the first; whole peak {result['peak'] / 1e9:.3f} GB, "
                f"{result['peak'] / base['peak']:.3f}x; {result['seconds']:.0f} s"
                + (f", chunks of {result['chunk']}" if "chunk" in result else "")
            )


def show_context(dtype: str) -> None:
    results = {bits: run_json(__file__, "--one", "context", bits, CONTEXT, dtype) for bits in (16, 8, 4)}
    print(f"{CONTEXT} tokens held")
    for bits, result in results.items():
        print(
            f"  {bits} bits: {result['bytes'] / 1e6:.1f} MB in {result['layers']} layers, "
            f"{result['bytes'] / results[16]['bytes']:.3f}x of 16 bits; all {LAYERS_OF_8X7B} layers of 8x7B "
            f"{result['bytes'] / result['layers'] * LAYERS_OF_8X7B / 1e9:.2f} GB"
        )


def show_saved(repeats: int) -> None:
    head, tail = prompt(1000), prompt(8, seed=1)
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder, load(checkpoint("mid", 4), prefix_cache=0) as model:
        model.generate(head[:64], max_tokens=2)
        for _ in range(repeats):
            started = time.perf_counter()
            wanted = model.generate([*head, *tail], max_tokens=1).token_ids
            cold.append(time.perf_counter() - started)
        model.save_prompt(Path(folder) / "saved", head)
        saved_bytes = (Path(folder) / "saved").stat().st_size
        with load(checkpoint("mid", 4)) as other:
            for _ in range(repeats):
                # Nothing of the last round may be reused.
                other.set_memory(None)
                started = time.perf_counter()
                other.load_prompt(Path(folder) / "saved")
                got = other.generate([*head, *tail], max_tokens=1).token_ids
                warm.append(time.perf_counter() - started)
                assert got == wanted, "a loaded prompt gives another token"
    first, loaded = statistics.median(cold), statistics.median(warm)
    print(
        f"first token after 1,000 and 8 tokens: computed {first:.3f} s, loaded from {saved_bytes / 1e6:.1f} MB {loaded:.3f} s, "
        f"{loaded / first:.3f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", default="16,4", help="16, 8 or 4, the first to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mlx-lm", action="store_true")
    parser.add_argument("--part", default="prefill,context,saved")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        task, bits, tokens, dtype = args.one
        print(json.dumps(TASKS[task](checkpoint("skinny"), int(bits) or None, int(tokens), dtype)))
        return
    parts = args.part.split(",")
    checkpoint("skinny")
    if "prefill" in parts:
        show_prefill(args.tokens, args.dtype, [int(bits) for bits in args.bits.split(",")], beside=args.mlx_lm)
    if "context" in parts:
        show_context(args.dtype)
    if "saved" in parts:
        show_saved(args.repeats)


if __name__ == "__main__":
    main()
