"""Convert, load, prefill and decode beside mlx-lm, in one run on one machine: medians, and the ratio of the two sides.

    make bench                          the mid shape (hidden 512, 8 layers, 8 experts of width 1792)
    make bench BENCH_ARGS=--wide        also conversion and loading at full 8x7B width, 2 and 4 layers (needs 30 GB of disk)
    make bench BENCH_ARGS="--repeats 9 --json"

A table of ratios, and at its end the scripts that measure the rest. Checkpoints are made once by a seeded script and kept in
bench-data. On MLX's CPU backend matrix products are nearly all of the time, so a ratio here shows that nothing is lost; it is
no measure of Metal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from make_checkpoint import make

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "bench-data"
# What else is measured, each by a script of its own.
FURTHER = {
    "start.py": "imports and --help",
    "steps.py": "GPU kernels a layer, Python's time a token",
    "batches.py FOLDER": "decode of 1 to 16 rows together",
    "load.py FOLDER --mlx-lm": "loading with cold caches, against a plain parallel read",
    "kv.py": "memory of keys and values, a saved prompt",
    "speculation.py": "tokens a forward with prompt lookup",
    "streaming.py FOLDER": "experts read from disk under a memory budget",
    "quality.py": "quality against size",
}
PROMPT_TOKENS = 128
DECODE_TOKENS = 16


def measured(task: str, *arguments: Path) -> dict[str, float]:
    """Run one task in its own process."""
    command = [sys.executable, str(HERE / "measure.py"), task, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def alternating(repeats: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """Both sides in turn, so that a drifting machine drifts for both."""
    results: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(repeats):
        results[0].append(ours())
        results[1].append(theirs())
    return results


def median(results: list[dict[str, float]], key: str) -> float:
    return statistics.median(result[key] for result in results)


class Table:
    """Rows of what, ours, mlx-lm's and the ratio."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, ours: float, theirs: float, unit: str, *, higher_is_better: bool = False) -> None:
        ratio = ours / theirs
        self.rows.append({"what": what, "ours": ours, "mlx_lm": theirs, "unit": unit, "ratio": ratio})
        note = "more is better" if higher_is_better else "less is better"
        print(f"{what:<44}{ours:>10.3g}{theirs:>10.3g} {unit:<6}{ratio:>7.2f}x  {note}", flush=True)


def converting_and_loading(table: Table, name: str, source: Path, repeats: int) -> Path:
    """Time and peak memory of conversion to 4 bits and of loading the result; returns our folder."""
    ours, theirs = DATA / f"{name}-ours", DATA / f"{name}-mlx-lm"
    done = alternating(
        repeats, lambda: measured("convert-ours", source, ours), lambda: measured("convert-mlx-lm", source, theirs)
    )
    table.add(f"convert {name}: time", *(median(side, "seconds") for side in done), "s")
    table.add(f"convert {name}: peak memory", *(median(side, "peak_bytes") / 1e9 for side in done), "GB")
    shutil.rmtree(theirs)
    # The same folder for both: what mlx-lm reads is what we wrote.
    loaded = alternating(repeats, lambda: measured("load-ours", ours), lambda: measured("load-mlx-lm", ours))
    table.add(f"load {name}: time", *(median(side, "seconds") for side in loaded), "s")
    table.add(f"load {name}: peak memory", *(median(side, "peak_bytes") / 1e9 for side in loaded), "GB")
    weights = loaded[0][0]["weight_bytes"] / 1e9
    print(
        f"    weights as they lie in memory {weights:.3f} GB, our peak {median(loaded[0], 'peak_bytes') / 1e9:.3f} GB"
    )
    return ours


def generating(table: Table, folder: Path, repeats: int, *, float32_only: bool) -> None:
    """Prefill and decode of one folder in one process, the sides in turn."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    from mlx_mixtral import load

    prompt = [int(i) for i in np.random.default_rng(0).integers(3, 32000, PROMPT_TOKENS)]
    model = load(folder, prefix_cache=0)  # every prefill is computed

    def ours() -> dict[str, float]:
        out = model.generate(prompt, max_tokens=DECODE_TOKENS)
        return {"prefill": out.stats.prompt_tok_s, "decode": out.stats.decode_tok_s}

    def theirs(network: Any) -> dict[str, float]:
        from mlx_lm.generate import generate_step

        started = time.perf_counter()
        steps = generate_step(
            mx.array(prompt), network, max_tokens=DECODE_TOKENS, prompt_cache=make_prompt_cache(network)
        )
        next(steps)
        first = time.perf_counter()
        count = sum(1 for _ in steps)
        return {"prefill": PROMPT_TOKENS / (first - started), "decode": count / (time.perf_counter() - first)}

    single, _ = load_model(folder)
    single.set_dtype(mx.float32)
    sides = {"mlx-lm in float32": single}
    if not float32_only:
        sides["mlx-lm as it comes"], _ = load_model(folder)
    for label, network in sides.items():
        ours(), theirs(network)
        done = alternating(repeats, ours, lambda network=network: theirs(network))
        for what in ("prefill", "decode"):
            values = (median(side, what) for side in done)
            table.add(f"{what}, against {label}", *values, "tok/s", higher_is_better=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wide", action="store_true", help="also full 8x7B width, 2 and 4 layers")
    parser.add_argument(
        "--float32-only", action="store_true", help="without mlx-lm as it comes, nearly all of the time"
    )
    parser.add_argument("--json", action="store_true", help="print all rows as JSON at the end")
    args = parser.parse_args()
    table = Table()
    print(f"{'':<44}{'ours':>10}{'mlx-lm':>10} {'':<6}{'ratio':>8}")
    if not (DATA / "mid" / "config.json").exists():
        make("mid", DATA / "mid")
    folder = converting_and_loading(table, "mid", DATA / "mid", args.repeats)
    generating(table, folder, args.repeats, float32_only=args.float32_only)
    if args.wide:
        for layers in (2, 4):
            source = DATA / f"wide-{layers}"
            make("wide", source, layers=layers)
            shutil.rmtree(converting_and_loading(table, source.name, source, repeats=1))
            shutil.rmtree(source)
    print("\nmeasured by scripts of their own:")
    for script, what in FURTHER.items():
        print(f"    python tests/benchmarks/{script:<26}{what}")
    print(
        f"    {'mlx-mixtral bench FOLDER --compare mlx-lm':<51}one folder, any machine: prefill, depth, batches, memory"
    )
    if args.json:
        print(json.dumps(table.rows, indent=1))


if __name__ == "__main__":
    main()
