"""Loading a checkpoint with cold caches, beside a plain parallel read of its files into fresh memory, and mlx-lm.

    python tests/benchmarks/load.py FOLDER [--repeats 5] [--mlx-lm] [--json]

Each side runs in a process of its own after the files were dropped from the page cache, the sides in turn. The plain read is
``preadv`` in as many threads, with pieces of the same size, into anonymous memory nobody has touched: what any program pays
that ends with the bytes in memory. Imports are not part of the time (``start.py`` measures them). Peak memory is the process's
(``VmHWM``); what it was before loading, the interpreter and its libraries, is shown apart. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from processes import peak_bytes, resident, run_json

from mlx_mixtral.weights.fill import CHUNK_BYTES, READ_THREADS


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def ours(folder: Path) -> Callable[[], dict[str, Any]]:
    import mlx.core as mx

    from mlx_mixtral import load

    def run() -> dict[str, Any]:
        model = load(folder)
        return {"weight_bytes": model.nbytes, "mlx_peak_bytes": mx.get_peak_memory()}

    return run


def plain(folder: Path) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        held, pieces = [], []
        for file in weight_files(folder):
            descriptor, size = os.open(file, os.O_RDONLY), file.stat().st_size
            held.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            view = memoryview(held[-1])
            pieces += [(descriptor, view[at : at + CHUNK_BYTES], at) for at in range(0, size, CHUNK_BYTES)]

        def read(piece: tuple[int, memoryview, int]) -> int:
            descriptor, into, offset = piece
            count = os.preadv(descriptor, [into], offset)
            assert count == len(into), "a short read"
            return count

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return {"weight_bytes": sum(pool.map(read, pieces))}

    return run


def mlx_lm(folder: Path) -> Callable[[], dict[str, Any]]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    def run() -> dict[str, Any]:
        network, _ = load_model(folder)
        mx.eval(network.parameters())
        return {"mlx_peak_bytes": mx.get_peak_memory()}

    return run


SIDES = {"ours": ours, "plain read": plain, "mlx-lm": mlx_lm}


def measure(side: str, folder: Path) -> dict[str, Any]:
    """One cold run of one side, in this process."""
    run = SIDES[side](folder)
    drop_from_cache(folder)
    base = resident("VmRSS")
    cpu, started = time.process_time(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    return result | {
        "seconds": seconds,
        "cpu_s": time.process_time() - cpu,
        "base_bytes": base,
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mlx-lm", action="store_true", help="run mlx-lm on the folder too")
    parser.add_argument("--json", action="store_true", help="print every run as JSON at the end")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("page caches are dropped and peaks read the way Linux does it; this needs Linux")
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.folder)))
        return
    sides = [side for side in SIDES if side != "mlx-lm" or arguments.mlx_lm]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side in sides:
            runs[side].append(run_json(__file__, arguments.folder, "--one", side))
    _print(runs, sum(file.stat().st_size for file in weight_files(arguments.folder)))
    if arguments.json:
        print(json.dumps(runs, indent=1))


def _print(runs: dict[str, list[dict[str, Any]]], file_bytes: int) -> None:
    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[side])

    print(f"{file_bytes / 1e9:.3f} GB of weight files, medians of {len(runs['ours'])} cold runs")
    print(f"{'':<12}{'seconds':>9}{'min..max':>14}{'GB/s':>7}{'CPU s':>7}{'peak GB':>9}{'before':>8}")
    for side, results in runs.items():
        seconds = median(side, "seconds")
        span = f"{min(r['seconds'] for r in results):.2f}..{max(r['seconds'] for r in results):.2f}"
        print(
            f"{side:<12}{seconds:>9.2f}{span:>14}{file_bytes / seconds / 1e9:>7.2f}{median(side, 'cpu_s'):>7.2f}"
            f"{median(side, 'peak_bytes') / 1e9:>9.3f}{median(side, 'base_bytes') / 1e9:>8.3f}"
        )
    weights, peak, base = (median("ours", key) for key in ("weight_bytes", "peak_bytes", "base_bytes"))
    print(f"time: {median('ours', 'seconds') / median('plain read', 'seconds'):.2f}x of the plain read")
    print(
        f"memory: weights {weights / 1e9:.3f} GB as they lie there; peak less what the process had before "
        f"{(peak - base) / weights:.3f}x, with it {peak / weights:.3f}x; peak of MLX "
        f"{median('ours', 'mlx_peak_bytes') / weights:.3f}x"
    )


if __name__ == "__main__":
    main()
