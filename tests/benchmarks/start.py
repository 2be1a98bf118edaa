"""What starting costs: imports and ``--help`` in fresh processes, beside the bare interpreter, MLX alone and mlx-lm.

    python tests/benchmarks/start.py [--repeats 15] [--json]

Every command is a process of its own, the commands in turn, so that all meet the same machine; the first round, which reads
files from disk and compiles modules to bytecode, does not count. Seconds are wall-clock of the whole process; processor seconds
(user and system) are beside them, for a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
CODE = "from mlx_mixtral.cli import main; main()"

COMMANDS = {
    "python": [PYTHON, "-c", "pass"],
    "import mlx.core": [PYTHON, "-c", "import mlx.core"],
    "import mlx.core, numpy": [PYTHON, "-c", "import mlx.core, numpy"],
    "import mlx.core, mlx_mixtral": [PYTHON, "-c", "import mlx.core, mlx_mixtral"],
    "from mlx_mixtral import load": [PYTHON, "-c", "from mlx_mixtral import load"],
    "import mlx_lm": [PYTHON, "-c", "import mlx_lm"],
    "mlx-mixtral --help": [PYTHON, "-c", CODE, "--help"],
    "mlx-mixtral generate --help": [PYTHON, "-c", CODE, "generate", "--help"],
    "python -m mlx_lm generate --help": [PYTHON, "-m", "mlx_lm", "generate", "--help"],
}
# What, of which command, less which, over which less which; the goal in seconds, None where there is none.
RESULTS = (
    ("import mlx_mixtral, beyond MLX", "import mlx.core, mlx_mixtral", "import mlx.core", "import mlx_lm", 0.15),
    ("import load, beyond MLX", "from mlx_mixtral import load", "import mlx.core", "import mlx_lm", None),
    (
        "import load, beyond MLX and numpy",
        "from mlx_mixtral import load",
        "import mlx.core, numpy",
        "import mlx_lm",
        None,
    ),
    ("mlx-mixtral --help", "mlx-mixtral --help", None, "python -m mlx_lm generate --help", 0.4),
    ("generate --help", "mlx-mixtral generate --help", None, "python -m mlx_lm generate --help", None),
)


def run(command: list[str], bytecode: str) -> tuple[float, float]:
    """Seconds of one process, by the clock and by its processors. ``bytecode`` is where Python keeps compiled modules."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "convert")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print all medians as JSON at the end")
    args = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as bytecode:
        for repeat in range(args.repeats + 1):
            for name, command in COMMANDS.items():
                measured = run(command, bytecode)
                if repeat:
                    runs[name].append(measured)
    medians = {name: [statistics.median(run[kind] for run in found) for kind in (0, 1)] for name, found in runs.items()}
    print(f"medians of {args.repeats} fresh processes{'':<8}{'seconds':>8}{'least..most':>16}{'processor s':>13}")
    for name, (seconds, processor) in medians.items():
        walls = [run[0] for run in runs[name]]
        print(f"    {name:<34}{seconds:>8.3f}{f'{min(walls):.3f}..{max(walls):.3f}':>16}{processor:>13.3f}")
    print(f"{'':<34}{'ours':>8}{'mlx-lm':>8}{'ratio':>8}")
    for what, ours, less, theirs, goal in RESULTS:
        base = medians[less][0] if less else 0.0
        mine, other = medians[ours][0] - base, medians[theirs][0] - base
        wanted = f"   (goal: under {goal} s)" if goal else ""
        print(f"{what:<34}{mine:>6.3f} s{other:>6.2f} s{mine / other:>7.2f}x{wanted}")
    if args.json:
        print(json.dumps({name: dict(zip(("seconds", "processor_s"), m, strict=True)) for name, m in medians.items()}))


if __name__ == "__main__":
    main()
