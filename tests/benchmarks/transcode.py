"""MB of GGUF blocks a second and core: re-packed for MLX, and dequantised, beside the gguf package's own dequantiser.

python tests/benchmarks/transcode.py [ROWS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "convert")]

from mlx_mixtral_convert.transcode import AFFINE, dequantize_affine, transcode  # noqa: E402

COLUMNS = 4096


def rate(nbytes: int, work: Callable[[], object]) -> float:
    """MB/s by processor time of this thread, the best of three."""
    best = float("inf")
    for _ in range(3):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return nbytes / best / 1e6


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    print(f"{'type':6} {'exact':>8} {'dequantised':>12} {'gguf package':>13}   MB/s of source, one core")
    for name, kind in AFFINE.items():
        raw = np.random.default_rng(0).integers(0, 60, (rows, COLUMNS // kind.weights * kind.block_bytes), np.uint8)
        out = np.empty((rows, COLUMNS), np.float32)
        theirs = gguf.GGMLQuantizationType[name]
        part = raw[: rows // 8]
        exact = rate(raw.nbytes, lambda raw=raw, kind=kind: transcode(raw, kind, "x"))  # type: ignore[misc]
        floats = rate(raw.nbytes, lambda raw=raw, kind=kind, out=out: dequantize_affine(raw, kind, out))  # type: ignore[misc]
        package = rate(part.nbytes, lambda part=part, theirs=theirs: gguf.quants.dequantize(part, theirs))  # type: ignore[misc]
        print(f"{name:6} {exact:8.0f} {floats:12.0f} {package:13.0f}")


if __name__ == "__main__":
    main()
