"""Generations without end on a model whose budget changes, whose files fail and whose callers leave early.

    python -m tests.soak.run                        2,000 generations
    python -m tests.soak.run --generations 50 --seed 3

Every token is compared with a resident model's. Memory and open files are watched: they must not grow.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_mixtral import Mixtral, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert import Recipe, convert

__all__ = ["SoakReport", "soak"]

TOKENS = 24
TEXTS = (
    "And God said", "Au commencement", "Und der HERR sprach", "Y aconteció que", "def __init__(self", "10 * 6 =",
    "In the beginning was the Word, and the Word was with God", "E avvenne che", "class Config:\n    def", "7 + 8 =",
)  # fmt: skip


@dataclass
class SoakReport:
    """What happened; ``problems`` is empty when all is well."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    """Active memory of MLX at the least budget, a sample every so often."""
    open_files: list[int] = field(default_factory=list)


def soak(generations: int, seed: int, folder: Path, checkpoint: Path | None = None) -> SoakReport:
    """Run it on a 4-bit copy made in ``folder`` of a checkpoint, the bundled one if none is given."""
    chance, report = random.Random(seed), SoakReport()
    model_folder = folder / "model"
    convert(checkpoint or checkpoint_path(), model_folder, recipe=Recipe(4))
    with load(model_folder) as whole:
        prompts = [whole.tokenizer.encode(text) * (1 + index % 3) for index, text in enumerate(TEXTS)]
        wanted = [whole.generate(prompt, max_tokens=TOKENS).token_ids for prompt in prompts]
        everything = whole.residency.plan.resident_bytes
        least = whole.min_memory_bytes
    del whole
    options = {"policy": chance.choice(("lru", "lfu")), "prefetch": chance.choice(("off", "on"))}
    with load(model_folder, memory=least, **options) as model:
        for number in range(generations):
            if chance.random() < 0.15:
                model.set_memory(chance.choice((least, everything, chance.randint(least, everything))))
                report.outcomes["budgets changed"] += 1
            index = chance.randrange(len(prompts))
            _generate(model, prompts[index], wanted[index], chance, report, model_folder)
            if number % max(1, generations // 20) == 0:
                model.set_memory(least)
                gc.collect()
                mx.clear_cache()
                report.memory_bytes.append(mx.get_active_memory())
                report.open_files.append(_open_files())
    # The first samples warm up what is kept: kernels, files, buffers.
    settled = report.memory_bytes[1:]
    if settled and settled[-1] > settled[0] + 200_000:
        report.problems.append(f"memory grew from {settled[0]} to {settled[-1]} bytes")
    files = report.open_files[1:]
    if files and files[-1] > files[0]:
        report.problems.append(f"open files grew from {files[0]} to {files[-1]}")
    return report


def _generate(
    model: Mixtral, prompt: list[int], wanted: tuple[int, ...], chance: random.Random, report: SoakReport, folder: Path
) -> None:
    length, leave_at = chance.randint(1, TOKENS), chance.choice((None, None, None, 1, 3, 7))
    fault = chance.choice((None,) * 6 + ("missing", "failing"))
    got: list[int] = []
    try:
        with _fault(model, fault, chance, folder), model.stream(prompt, max_tokens=length) as stream:
            for chunk in stream:
                got.append(chunk.token_id)
                if len(got) == leave_at:
                    break
    except CheckpointError:
        report.outcomes["failed"] += 1
        if fault is None:
            report.problems.append("a generation failed without a fault")
    else:
        report.outcomes["cancelled" if len(got) == leave_at else "finished"] += 1
    if tuple(got) != wanted[: len(got)]:
        report.problems.append(
            f"wrong tokens with slots {model.residency.slots}: {got} instead of {wanted[: len(got)]}"
        )


@contextmanager
def _fault(model: Mixtral, fault: str | None, chance: random.Random, folder: Path) -> Iterator[None]:
    """A weight file is away, or reads of it fail, for the time of one generation."""
    if fault == "missing":
        file = chance.choice(sorted(folder.glob("*.safetensors")))
        aside = file.with_suffix(".aside")
        file.rename(aside)
        try:
            yield
        finally:
            aside.rename(file)
        return
    if fault == "failing" and model.residency.is_streamed:
        reader, after = model.residency.store.reader, chance.randint(0, 40)
        read, count = reader.read, 0

        def failing(*arguments: object) -> None:
            nonlocal count
            count += 1
            if count > after:
                raise CheckpointError("tensor cannot be read: Input/output error")
            read(*arguments)  # type: ignore[arg-type]

        reader.read = failing  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del reader.read
        return
    yield


def _open_files() -> int:
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
    return len(os.listdir(folder))  # noqa: PTH208


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(arguments.generations, arguments.seed, Path(folder))
    print(f"{arguments.generations} generations in {time.perf_counter() - started:.0f} s: {dict(report.outcomes)}")
    print(f"memory at the least budget, first to last: {[f'{n / 1e6:.2f} MB' for n in report.memory_bytes[::4]]}")
    print(f"open files: {report.open_files[::4]}")
    if report.problems:
        print("\n".join(report.problems[:20]))
        sys.exit(1)
    print("no wrong token, no growth")


if __name__ == "__main__":
    main()
