"""Convert, load, prefill and decode beside mlx-lm, in one run on one machine: medians, and the ratio of the two.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_checkpoint import make
from processes import run_json

from mlx_mixtral import MixtralConfig, load
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.bench.cases import plan_cases
from mlx_mixtral.bench.measurements import OURS, BenchReport
from mlx_mixtral.bench.mlx_lm_backend import MlxLm
from mlx_mixtral.bench.run import Opener, run_bench

MEASURE = str(Path(__file__).parent / "measure.py")
DATA = Path(__file__).parents[2] / "bench-data"
# What else is measured, each by a script of its own.
FURTHER = {
    "start.py": "imports and --help",
    "steps.py": "GPU kernels per layer, Python's time per token",
    "load.py FOLDER --mlx-lm": "loading with cold caches, against a plain parallel read",
    "kv.py": "memory of keys and values, a saved prompt",
    "speculation.py": "tokens per forward pass with prompt lookup",
    "streaming.py FOLDER": "experts read from disk under a memory budget",
    "quality.py": "quality against size",
}
PROMPT_TOKENS = 128
DECODE_TOKENS = 16


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
        repeats,
        lambda: run_json(MEASURE, "convert-ours", source, ours),
        lambda: run_json(MEASURE, "convert-mlx-lm", source, theirs),
    )
    table.add(f"convert {name}: time", *(median(runs, "seconds") for runs in done), "s")
    table.add(f"convert {name}: peak memory", *(median(runs, "peak_bytes") / 1e9 for runs in done), "GB")
    shutil.rmtree(theirs)
    # The same folder for both: what mlx-lm reads is what we wrote.
    loaded = alternating(
        repeats, lambda: run_json(MEASURE, "load-ours", ours), lambda: run_json(MEASURE, "load-mlx-lm", ours)
    )
    table.add(f"load {name}: time", *(median(runs, "seconds") for runs in loaded), "s")
    table.add(f"load {name}: peak memory", *(median(runs, "peak_bytes") / 1e9 for runs in loaded), "GB")
    weights = loaded[0][0]["weight_bytes"] / 1e9
    print(
        f"    weights as they lie in memory {weights:.3f} GB, our peak {median(loaded[0], 'peak_bytes') / 1e9:.3f} GB"
    )
    return ours


def generating(table: Table, folder: Path, repeats: int, *, float32_only: bool) -> None:
    """Prefill and decode of one folder as ``mlx-mixtral bench`` measures them, the backends in turn."""
    openers: dict[str, Opener] = {OURS: lambda: Ours(load(folder)), "float32": lambda: MlxLm(folder, in_float32=True)}
    if not float32_only:
        openers["in its own type"] = lambda: MlxLm(folder)
    config, report = MixtralConfig.from_folder(folder), BenchReport()
    sizes = {"prompts": [PROMPT_TOKENS], "depths": [PROMPT_TOKENS], "batches": []}
    cases = plan_cases(config.max_position_embeddings, **sizes, tokens=DECODE_TOKENS, repeats=repeats)
    run_bench(openers, cases, config.vocab_size, report)
    for theirs in list(openers)[1:]:
        for what, row in (("prefill", report.of("prefill")[0]), ("decode", report.of("decode")[0])):
            rates = row.tok_s(OURS).median, row.tok_s(theirs).median
            label = "mlx-lm in float32" if theirs == "float32" else "mlx-lm in its own type"
            table.add(f"{what}, against {label}", *rates, "tok/s", higher_is_better=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wide", action="store_true", help="also full 8x7B width, 2 and 4 layers")
    parser.add_argument(
        "--float32-only", action="store_true", help="without mlx-lm in its own type, nearly all of the time"
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
