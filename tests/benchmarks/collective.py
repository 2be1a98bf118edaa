"""One process of a ring, started by ``several_machines.py``: times sums, and prints their medians as JSON on its last line.

python tests/benchmarks/collective.py FLOATS,FLOATS,… REPEATS
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time

import mlx.core as mx

SECONDS = 120
WARM_UP = 3


def median_s(stream: mx.Stream, floats: int, repeats: int) -> float:
    """Seconds of one sum of so many float32 on all processes."""
    value = mx.ones(floats, mx.float32)
    mx.eval(value)
    times = []
    for number in range(WARM_UP + repeats):
        started = time.perf_counter()
        mx.eval(mx.distributed.all_sum(value, stream=stream))
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    # MLX waits for other processes without a limit, for some of the time with Python's lock; this ends it once it lets go.
    watchdog = threading.Timer(SECONDS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    mx.set_default_device(mx.Device(mx.cpu))
    mx.distributed.init(strict=True, backend="ring")
    stream, repeats = mx.new_stream(mx.Device(mx.cpu)), int(sys.argv[2])
    found = {floats: median_s(stream, floats, repeats) for floats in map(int, sys.argv[1].split(","))}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
