"""Experts beyond memory on a checkpoint: peak memory against the budget, decode time against fully resident and the disk.

    python tests/benchmarks/streaming.py FOLDER                    budgets with 100, 50 and 25% of the experts, and the least
    python tests/benchmarks/streaming.py FOLDER --shares 0.5 --mlx-lm --json

``--mlx-lm`` runs mlx-lm on the same folder under the same limit, in float32 on the CPU backend; it has to hold everything.
``--llama-cpp FILE`` runs llama.cpp on a GGUF of the same weights (``mlx-mixtral convert FOLDER FILE --to gguf --type Q4_1``),
with the llama-cpp-python of this interpreter or of ``--llama-python``.

Each budget runs in a process of its own, under a limit on its memory (a control group where this user may make one) and so that
its peak is its own. The disk is read past the page cache throughout. ``replay`` reads the experts of the decode steps again
without arithmetic, beside a plain parallel ``pread`` of the same bytes from the same places: what the disk itself can do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from budgets import budget_of
from peers import PROCESS_BYTES, limited, llama_cpp, mlx_lm
from processes import peak_bytes, run_json

from mlx_mixtral import Mixtral, load
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.experts.pool import SlotPool
from mlx_mixtral.experts.store import Loading
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import compute_dtype, current_device
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.planning import make_planner
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.fill import CHUNK_BYTES, READ_THREADS


def measure(folder: Path, budget: int | None, prompt_tokens: int, tokens: int, prefetch: str) -> dict[str, Any]:
    base = peak_bytes()
    started = time.perf_counter()
    model = load(folder, memory=budget, context=1024, prefetch=prefetch)
    load_s = time.perf_counter() - started
    residency = model.residency
    starts: list[tuple[int, int]] = []
    begin = residency.store.start

    def noted(layer: int, expert: int, *rest: Any) -> Loading:
        starts.append((layer, expert))
        return begin(layer, expert, *rest)

    residency.store.start = noted  # type: ignore[method-assign]
    calls: list[PromptCall] = []
    watch(model, calls, starts)
    prompt = [int(i) for i in np.random.default_rng(0).integers(3, model.config.vocab_size, prompt_tokens)]
    out = model.generate(prompt, max_tokens=1)
    prefill_bytes, prefill_misses, prefill_s = residency.bytes_read, residency.misses, out.stats.time_to_first_token_s
    watch(model, None, starts)
    streamed = [slots < residency.sizes.num_experts for slots in residency.slots]
    prompt_reads = list(starts)
    starts.clear()
    out = model.generate(prompt[:8], max_tokens=tokens)
    stats, peak_mlx = out.stats, mx.get_peak_memory()
    result: dict[str, Any] = {
        "budget": budget,
        "slots": residency.slots,
        "chunk_tokens": residency.plan.chunk_tokens,
        "load_s": load_s,
        "prefill_s": prefill_s,
        "prefill_tok_s": prompt_tokens / prefill_s,
        "prefill_misses": prefill_misses,
        "prefill_bytes": prefill_bytes,
        "prefill_missing_bytes": missing_bytes(model, calls),
        "prefill_reads_as_missing": all(call.reads_are_missing(prompt_reads) for call in calls),
        "chunks": -(-prompt_tokens // residency.plan.chunk_tokens),
        "decode_s": stats.decode_s / (tokens - 1),
        "predicted_s": None if residency.plan.residency is None else residency.plan.residency.seconds_per_token,
        "peak_mlx": peak_mlx,
        "peak_rss": peak_bytes(),
        "base_rss": base,
        "token_ids": out.token_ids,
    }
    if (experts := stats.decode_experts) is not None and any(streamed):
        result |= {
            "hit_rate": experts.hit_rate,
            "bytes_per_token": experts.bytes_read / (tokens - 1),
            "readbacks_per_token": experts.readbacks / (tokens - 1),
            "wait_s": experts.wait_s / (tokens - 1),
            "recall": experts.predicted_right / max(experts.predicted_needed, 1),
            "waste": 1 - experts.predicted_right / experts.predicted if experts.predicted else 0.0,
        }
        result |= replay(model, starts)
    return result


@dataclass
class PromptCall:
    """What one call of a layer chose, what its pool held before, and how many reads had begun."""

    layer: int
    held: set[int]
    reads_before: int
    selected_experts: mx.array

    @property
    def missing(self) -> set[int]:
        return set(np.asarray(self.selected_experts).reshape(-1).tolist()) - self.held

    def reads_are_missing(self, reads: list[tuple[int, int]]) -> bool:
        """Whether each missing expert was read once and nothing else; the layer's reads are a run after ``reads_before``."""
        run = itertools.takewhile(lambda read: read[0] == self.layer, reads[self.reads_before :])
        return sorted(expert for _, expert in run) == sorted(self.missing)


def watch(model: Mixtral, calls: list[PromptCall] | None, reads: list[tuple[int, int]]) -> None:
    """Note every call of a streamed layer in ``calls``; None ends it."""
    for index, layer in enumerate(model.module.layers):
        pool = layer.moe.experts.pool
        if pool is None:
            continue

        def note(selected_experts: mx.array, _: mx.array, index: int = index, pool: SlotPool = pool) -> None:
            assert calls is not None
            held = {expert for layer, expert in pool.keys if layer == index}
            calls.append(PromptCall(index, held, len(reads), selected_experts))

        layer.moe.observe(watch, None if calls is None else note)


def missing_bytes(model: Mixtral, calls: list[PromptCall]) -> int:
    """Bytes of the experts that calls needed and did not find, each once a call."""
    parts = model.residency.store.parts
    return sum(part.nbytes for call in calls for expert in call.missing for part in parts[call.layer][expert])


def replay(model: Mixtral, experts: list[tuple[int, int]]) -> dict[str, float]:
    """Bytes per second of reading ``experts`` as generation does, two at a time, and of plain reads of the same ranges."""
    residency = model.residency
    store = residency.store
    # The two slots any pool has: nothing computes now, and the experts in them are forgotten afterwards.
    pool = next(layer.pool for layer in residency.layers if layer.pool is not None)
    ours = theirs = nbytes = 0.0
    half = [experts[i : i + 2] for i in range(0, len(experts), 2)]
    for number, pair in enumerate(half):
        fills = [item for layer, expert in pair for item in store.ranges(layer, expert, pool.bank.arrays, 0)]
        sides = [lambda pair=pair: _ours(store, pool, pair), lambda fills=fills: _plain(fills)]
        times = {}
        # In turn, so that neither always meets what the other left in the drive's own cache.
        for side in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            sides[side]()
            times[side] = time.perf_counter() - started
        ours, theirs = ours + times[0], theirs + times[1]
        nbytes += sum(item.nbytes for item in fills)
    return {"replay_bytes_per_s": nbytes / ours, "pread_bytes_per_s": nbytes / theirs, "replayed_bytes": nbytes}


def _ours(store: Any, pool: Any, pair: list[tuple[int, int]]) -> None:
    loadings = [
        type(store).start(store, layer, expert, pool.bank.arrays, slot) for slot, (layer, expert) in enumerate(pair)
    ]
    for loading in loadings:
        if (problem := loading.wait()) is not None:
            raise problem


_OPENED: dict[Path, int] = {}
_BUFFERS = [np.empty(CHUNK_BYTES + 8192, np.uint8) for _ in range(READ_THREADS)]


def _plain(fills: list[Any]) -> None:
    """The same bytes with ``pread`` past the page cache into fresh memory, in as many threads."""
    import mmap

    pieces = []
    for item in fills:
        file = item.info.file
        if file not in _OPENED:
            _OPENED[file] = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        start = item.info.offset + item.start * item.info.row_bytes
        end = start + item.nbytes
        start, end = start // 4096 * 4096, -(-end // 4096) * 4096
        pieces += [(_OPENED[file], at, min(CHUNK_BYTES, end - at)) for at in range(start, end, CHUNK_BYTES)]

    def read(piece: tuple[int, int, int]) -> int:
        descriptor, offset, count = piece
        with mmap.mmap(-1, count) as memory:
            return os.preadv(descriptor, [memory], offset)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        sum(pool.map(read, pieces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.5, 0.25, 0.0])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prefetch", default="off", help="off, on or auto")
    parser.add_argument("--mlx-lm", action="store_true")
    parser.add_argument("--llama-cpp", type=Path, metavar="FILE")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--budgets", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.budgets:
        print(json.dumps(budgets(arguments.folder, arguments.shares)))
        return
    if arguments.one is not None:
        one = arguments.one or None
        print(json.dumps(measure(arguments.folder, one, arguments.prompt, arguments.tokens, arguments.prefetch)))
        return
    sizes = run_json(__file__, arguments.folder, "--budgets", "--shares", *arguments.shares)
    rows = []
    for share, budget in zip(arguments.shares, sizes, strict=True):
        with limited(budget + PROCESS_BYTES) as prefix:
            options = ["--prompt", arguments.prompt, "--tokens", arguments.tokens, "--prefetch", arguments.prefetch]
            try:
                found = run_json(__file__, arguments.folder, "--one", budget, *options, prefix=prefix)
            except RuntimeError as error:
                print(f"share {share}: failed: {str(error)[-300:]}", flush=True)
                continue
        row = {"share": share, "limited": bool(prefix), **found}
        rows.append(row)
        _print(row, rows[0])
        if arguments.mlx_lm:
            print(f"  {mlx_lm(arguments.folder, budget, arguments.tokens)}", flush=True)
        if arguments.llama_cpp is not None:
            print(f"  {llama_cpp(arguments.llama_python, arguments.llama_cpp, budget, arguments.tokens)}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


def budgets(folder: Path, shares: list[float]) -> list[int]:
    """Bytes for each share, from headers alone; in a process of its own, as it opens MLX's device."""
    device = current_device()
    config, dtype = MixtralConfig.from_folder(folder), compute_dtype("auto", device)
    builder = Builder(config, Checkpoint(folder), dtype, products=products_for(device))
    planner = make_planner(builder, device)
    return [budget_of(planner, share, 1024) for share in shares]


def _print(row: dict[str, Any], whole: dict[str, Any]) -> None:
    budget, same = row["budget"], row["token_ids"] == whole["token_ids"]
    print(
        f"share {row['share']:.0%}: budget {budget / 1e9:.2f} GB{' in a control group' if row['limited'] else ''}, "
        f"slots {row['slots']}, chunk {row['chunk_tokens']}"
    )
    print(
        f"  peak of MLX {row['peak_mlx'] / 1e9:.2f} GB = {row['peak_mlx'] / budget:.2f}x, of the process "
        f"{row['peak_rss'] / 1e9:.2f} GB ({row['base_rss'] / 1e9:.2f} before loading)"
    )
    exact = "" if row["prefill_reads_as_missing"] else ", NOT each missing expert once"
    print(
        f"  prefill {row['prefill_tok_s']:.2f} tok/s; {row['chunks']} chunks, {row['prefill_misses']} experts read, "
        f"{row['prefill_bytes'] / 1e6:.0f} MB; missing experts once a chunk {row['prefill_missing_bytes'] / 1e6:.0f} MB{exact}"
    )
    line = f"  decode {row['decode_s']:.3f} s per token ({whole['decode_s']:.3f} with everything resident)"
    if "bytes_per_token" in row:
        disk_s = row["bytes_per_token"] / row["pread_bytes_per_s"]
        larger = max(whole["decode_s"], disk_s)
        if row["recall"]:
            print(
                f"  looking ahead found {row['recall']:.0%} of what was missing, {row['waste']:.0%} of its reads for nothing"
            )
        line += (
            f", predicted {row['predicted_s']:.3f}; bytes / raw disk {disk_s:.3f} s: "
            f"{row['decode_s'] / larger:.2f}x the larger\n"
            f"  hits {row['hit_rate']:.0%}, {row['bytes_per_token'] / 1e6:.0f} MB and {row['readbacks_per_token']:.1f} "
            f"read-backs per token, {row['wait_s'] / row['decode_s']:.0%} waiting\n"
            f"  replay {row['replay_bytes_per_s'] / 1e9:.2f} GB/s against plain pread "
            f"{row['pread_bytes_per_s'] / 1e9:.2f} GB/s: {row['replay_bytes_per_s'] / row['pread_bytes_per_s']:.2f}x"
        )
    print(line)
    print(f"  tokens {'as with everything resident' if same else 'DIFFER'}", flush=True)


if __name__ == "__main__":
    main()
