"""One process of a ring, started by ``several_machines.py``: prints the median and the least seconds of sums as JSON.

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


def measured_s(stream: mx.Stream, floats: list[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of sums of so many float32 on all processes. Sizes take turns, so that all meet the same machine."""
    values = {count: mx.ones(count, mx.float32) for count in floats}
    mx.eval(list(values.values()))
    times: dict[int, list[float]] = {count: [] for count in floats}
    for number in range(WARM_UP + repeats):
        for count, value in values.items():
            started = time.perf_counter()
            mx.eval(mx.distributed.all_sum(value, stream=stream))
            if number >= WARM_UP:
                times[count].append(time.perf_counter() - started)
    return times


def main() -> None:
    # MLX waits for other processes without a limit, for some of the time with Python's lock; this ends it once it lets go.
    watchdog = threading.Timer(SECONDS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    mx.set_default_device(mx.Device(mx.cpu))
    mx.distributed.init(strict=True, backend="ring")
    stream, repeats = mx.new_stream(mx.Device(mx.cpu)), int(sys.argv[2])
    times = measured_s(stream, [int(count) for count in sys.argv[1].split(",")], repeats)
    print(json.dumps({count: [statistics.median(each), min(each)] for count, each in times.items()}), flush=True)


if __name__ == "__main__":
    main()
