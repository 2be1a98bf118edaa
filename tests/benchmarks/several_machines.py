"""Several machines: the predicted speeds of both splits, and what sums over a ring of processes cost here.

python tests/benchmarks/several_machines.py [--repeats 50] [--no-measuring]

The first table is the cost model of ``info --machines``: a prediction from published bandwidths and latencies. The second is
measured: processes on this machine, MLX's ring backend over 127.0.0.1, the CPU backend. A latency and a bandwidth are fitted
to four sizes, in a ring of n a sum moving 2 (n - 1) / n of its bytes past each process, and predict two others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from mlx_mixtral.distributed.cost import TokenBytes  # noqa: E402
from mlx_mixtral.info.estimate import BUILT_IN, Width, bytes_by_part  # noqa: E402
from mlx_mixtral.info.links import find_link  # noqa: E402
from mlx_mixtral.info.splits import ModelParts, decoding_rate, token_bytes  # noqa: E402
from mlx_mixtral.sizes import format_bytes  # noqa: E402

BANDWIDTHS_GB_S = (400, 546, 800)
CASES = (("8x7b", 2), ("8x22b", 2), ("8x22b", 4))
CABLES = ("thunderbolt", "thunderbolt5")
FITTED_BYTES = (4 * 2**10, 16 * 2**10, 2**20, 16 * 2**20)
OTHER_BYTES = (128 * 2**10, 4 * 2**20)
SECONDS = 150


def token_of(name: str) -> TokenBytes:
    """Bytes that a token of a published model reads at 4 bits (4.5 with scales)."""
    config = BUILT_IN[name]
    return token_bytes(ModelParts(config, bytes_by_part(config, Width(4)), 64))


def predicted_rows() -> list[list[str]]:
    """The table of docs/several-macs.md, its header first: tok/s at each bandwidth."""

    def cell(seconds: Sequence[float]) -> str:
        return "/".join(f"{1 / each:.0f}" for each in seconds)

    rows = [["predicted tok/s", *(f"{name.replace('b', 'B')} on {machines}" for name, machines in CASES)]]
    rows.append(
        [
            "one machine, if it fits",
            *(cell([token_of(n).one_machine_s(decoding_rate(b)) for b in BANDWIDTHS_GB_S]) for n, _ in CASES),
        ]
    )
    for cable in CABLES:
        link = find_link(cable)
        layers = [
            [token_of(n).layers_s(decoding_rate(b), link.collective_s(m), m) for b in BANDWIDTHS_GB_S] for n, m in CASES
        ]
        experts = [
            [
                token_of(n).experts_s(decoding_rate(b), link.collective_s(m), BUILT_IN[n].num_hidden_layers, 1 / m)
                for b in BANDWIDTHS_GB_S
            ]
            for n, m in CASES
        ]
        rows.append([f"layers, {cable}", *map(cell, layers)])
        rows.append([f"experts, {cable}", *map(cell, experts)])
    return rows


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


def measure(processes: int, sizes: Sequence[int], repeats: int) -> dict[int, tuple[float, float]]:
    """Median and least seconds of a sum of each size in bytes, as rank 0 saw them. No child outlives this.

    Raises:
        RuntimeError: a process failed or took too long.
    """
    command = [sys.executable, str(Path(__file__).with_name("collective.py"))]
    command += [",".join(str(size // 4) for size in sizes), str(repeats)]
    children: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(processes)]))
        try:
            for rank in range(processes):
                environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                children.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                    )
                )
            ends = [child.communicate(timeout=SECONDS) for child in children]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{processes} processes took more than {SECONDS} s") from None
        finally:
            for child in children:
                child.kill()
                child.wait()
    for child, (_, said) in zip(children, ends, strict=True):
        if child.returncode:
            raise RuntimeError(said.strip()[-500:] or f"a process ended with status {child.returncode}")
    found: Mapping[str, list[float]] = json.loads(ends[0][0].splitlines()[-1])
    return {int(floats) * 4: (median, least) for floats, (median, least) in found.items()}


def fit(processes: int, seconds: Mapping[int, float]) -> tuple[float, float]:
    """Latency in seconds and bytes a second, by least squares of relative errors: a sum takes latency + moved / rate."""
    moved = 2 * (processes - 1) / processes * np.array(list(seconds), float)
    times = np.array(list(seconds.values()))
    design = np.stack([np.ones_like(moved), moved], axis=1) / times[:, None]
    (latency, inverse), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    return float(latency), float(1 / inverse)


def print_measured(repeats: int) -> None:
    """Fits to medians and, for a machine that does other things too, to the least times; and what they predict."""
    for processes in (2, 3):
        found = measure(processes, (*FITTED_BYTES, *OTHER_BYTES), repeats)
        for index, name in enumerate(("median", "least")):
            seconds = {size: found[size][index] for size in sorted(found)}
            latency, rate = fit(processes, {size: seconds[size] for size in FITTED_BYTES})
            print(f"\n{processes} processes, {name}: c = {latency * 1e3:.3f} ms, {format_bytes(rate)}/s")
            for size, measured in seconds.items():
                predicted = latency + 2 * (processes - 1) / processes * size / rate
                what = "predicted" if size in OTHER_BYTES else "fitted"
                print(
                    f"  {size / 2**10:6.0f} KiB  measured {measured * 1e3:8.3f} ms  {what:>9} {predicted * 1e3:8.3f} ms"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-measuring", action="store_true", help="print the predictions only")
    given = parser.parse_args()
    # Also when it is told to end: children are ended by id on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"A prediction, not a measurement: 4.5 bits a weight, at {'/'.join(map(str, BANDWIDTHS_GB_S))} GB/s\n")
    rows = predicted_rows()
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "---|" * len(CASES))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    if not given.no_measuring:
        print("\nMeasured here: sums of float32 over a ring on 127.0.0.1, CPU backend")
        print_measured(given.repeats)


if __name__ == "__main__":
    main()
