"""What each of several machines takes of memory and of the disk: loading and generating, in processes on this machine.

    python tests/benchmarks/make_checkpoint.py wide bench-data/wide-2 --layers 2
    mlx-mixtral convert bench-data/wide-2 bench-data/wide-2-4bit
    python tests/benchmarks/several_machines_memory.py bench-data/wide-2-4bit [--memory 1.2GB] [--context 512]

A row is a process. ``weights`` is what the plan of its share says, ``held`` what the module holds, ``active`` MLX's memory
after loading, ``peak`` the most of it during ``load``, ``read`` what the process read of files meanwhile (Linux), and
``generating`` the most of MLX's memory while the group generates: with ``--memory`` that has to stay within the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import mlx.core as mx  # noqa: E402

from mlx_mixtral import join_group, load  # noqa: E402
from mlx_mixtral.model.build import Builder  # noqa: E402
from mlx_mixtral.weights.checkpoint import Checkpoint  # noqa: E402
from tests.distributed.launching import ended, ranks  # noqa: E402

SPLITS = ("experts", "layers")
PROMPT_TOKENS, NEW_TOKENS, GENERATIONS = 96, 8, 3
SECONDS = 300


def read_so_far() -> int:
    """Bytes this process has read of files, the page cache's included; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().split()
    except OSError:
        return 0
    return int(lines[lines.index("rchar:") + 1])


def own_report(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load and generate as one machine of the group that the environment names, or alone."""
    group = join_group()
    peak_before: int | None = None

    def begun(at: object) -> None:
        # What was measured before, to choose a split, had arrays of its own.
        nonlocal peak_before
        if peak_before is None:
            peak_before = mx.get_peak_memory()
            mx.reset_peak_memory()

    shared = {"group": group, "peer_timeout_s": SECONDS / 2} if group is not None else {}
    if group is None:
        options = {name: value for name, value in options.items() if name not in ("split", "shares")}
    mx.reset_peak_memory()
    before, active_before, started = read_so_far(), mx.get_active_memory(), time.perf_counter()
    with load(folder, progress=begun, **options, **shared) as model:
        load_s = time.perf_counter() - started
        link, module = model.engine.link, model.module
        share = None if link is None else link.share
        dtype = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[module.dtype]
        planned = Builder(model.config, Checkpoint(folder), dtype, share=share)
        found = {
            "rank": 0 if share is None else share.rank,
            "weights": planned.memory_bytes,
            "expert_bytes": sum(planned.sizes().expert_bytes) * model.config.num_local_experts,
            "held": model.nbytes,
            "resident": model.residency.resident_bytes,
            "active": mx.get_active_memory() - active_before,
            "filling": max(mx.get_peak_memory(), mx.get_active_memory()) - active_before,
            "peak": max(mx.get_peak_memory(), mx.get_active_memory(), peak_before or 0) - active_before,
            "read": read_so_far() - before,
            "load_s": load_s,
            "budget": model.engine.plan.budget_bytes,
        }
        mx.reset_peak_memory()
        if model.is_leader:
            for index in range(GENERATIONS):
                # The first half is an earlier prompt's: its keys and values were kept.
                ids = [3 + (7 * place + (place // 48) * index) % 200 for place in range(PROMPT_TOKENS)]
                model.generate(ids, max_tokens=NEW_TOKENS, stop_token_ids=())
        else:
            model.follow()
        found["generating"] = mx.get_peak_memory() - active_before
    return found


def reports(folder: Path, machines: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each machine says, by rank.

    Raises:
        RuntimeError: one of them failed.
    """
    with ranks(machines, str(Path(__file__)), folder, "--report", json.dumps(options)) as found:
        if any(ended(found, SECONDS)):
            raise RuntimeError("; ".join(each.said.strip()[-300:] for each in found))
        return [json.loads("".join(each.out)) for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", help="a budget of each machine")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.report is not None:
        print(json.dumps(own_report(given.folder, json.loads(given.report))))
        return
    print("| machines | rank | weights | held | active | peak / weights | read | load s | generating | budget |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    options = {"device": "cpu", "memory": given.memory, "context": given.context}
    for machines, split in ((1, None), *((2, split) for split in SPLITS)):
        own = options if split is None else options | {"split": split, "shares": [1, 1]}
        for each in reports(given.folder, machines, own):
            numbers = [f"{each[name] / 1e6:.0f} MB" for name in ("weights", "held", "active")]
            numbers += [
                f"{each['peak'] / each['weights']:.3f}",
                f"{each['read'] / 1e6:.0f} MB",
                f"{each['load_s']:.1f}",
            ]
            numbers += [
                f"{each['generating'] / 1e6:.0f} MB",
                "" if each["budget"] is None else f"{each['budget'] / 1e6:.0f} MB",
            ]
            print(f"| {machines} {split or ''} | {each['rank']} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
