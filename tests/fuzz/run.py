"""``make fuzz``: mutated files of every format through the real ``convert``; each ends in a MixtralError or a sound result.

A case is its format and number: ``--case gguf:123`` does that one again. What fails is kept in a folder, the files with a
report beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.fuzz.mutate import mutate
from tests.fuzz.places import put
from tests.fuzz.seeds import FORMATS, Seed, make_seeds

ROOT = Path(__file__).parents[2]
RENEW_CASES = 200
Case = tuple[str, int]


@dataclass
class Campaign:
    """What became of the cases: outcomes counted by (format, name), and those that failed."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[Case, str] = field(default_factory=dict)
    slowest: tuple[float, Case | None] = (0.0, None)

    def count(self, fmt: str) -> int:
        return sum(count for (held, _), count in self.outcomes.items() if held == fmt)

    def add(self, case: Case, outcome: str, seconds: float, failure: str | None) -> None:
        self.outcomes[case[0], outcome] += 1
        self.slowest = max(self.slowest, (seconds, case), key=lambda pair: pair[0])
        if failure is not None:
            self.failures[case] = failure


class _Worker:
    """A worker process, started anew whenever a case has ended it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0

    def ask(self, case: Case) -> tuple[str, float, str | None]:
        self._asked += 1
        # Threads of models that were loaded hold address space, which is limited.
        if self._asked % RENEW_CASES == 0:
            self.stop()
        process = self._process or self._start()
        talk, listen = _pipes(process)
        talk.write(f"{case[0]} {case[1]}\n")
        talk.flush()
        if line := listen.readline():
            answer = json.loads(line)
            return answer["outcome"], answer["seconds"], answer["failure"]
        process.communicate()
        code = process.returncode
        self._process = None
        said = (self._folder / "stderr").read_text(errors="replace")
        outcome = "Timeout" if "Timeout" in said else f"exit {code}"
        return outcome, 0.0, f"the process ended with {code} ({outcome})\n{said[-6000:]}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "root").mkdir(parents=True)
        paths = [str(ROOT), str(ROOT / "convert"), os.environ.get("PYTHONPATH", "")]
        with (self._folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self._folder / "root")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self._folder,
                # Each arena of the allocator reserves 64 MB of address space.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MALLOC_ARENA_MAX": "2"},
            )
        if _pipes(self._process)[1].readline() != "ready\n":
            raise RuntimeError(f"a worker does not start:\n{(self._folder / 'stderr').read_text()[-3000:]}")
        return self._process


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def campaign(cases: Iterable[Case], *, processes: int = 2, keep: Path | None = None) -> Campaign:
    """Run ``cases``; what fails is written into ``keep``."""
    found, waiting, lock = Campaign(), iter(cases), threading.Lock()
    errors: list[BaseException] = []

    def work(folder: Path) -> None:
        worker = _Worker(folder)
        try:
            while not errors:
                with lock:
                    case = next(waiting, None)
                if case is None:
                    break
                answer = worker.ask(case)
                with lock:
                    found.add(case, *answer)
        except BaseException as error:
            errors.append(error)
        finally:
            worker.stop()

    with tempfile.TemporaryDirectory(prefix="mlx-mixtral-fuzz-", dir=_memory_folder()) as name:
        threads = [threading.Thread(target=work, args=(Path(name) / str(n),)) for n in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        if keep is not None and found.failures:
            made = Path(name) / "seeds"
            made.mkdir()
            _keep(found, keep, make_seeds(made))
    return found


def _memory_folder() -> str | None:
    """A folder in memory, where a conversion's flushes cost nothing; None: the usual one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _keep(found: Campaign, keep: Path, seeds: dict[str, list[Seed]]) -> None:
    for (fmt, number), failure in found.failures.items():
        seed, files, exact = mutate(seeds[fmt], fmt, number)
        folder = keep / f"{fmt}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        put(folder, files)
        (folder / "REPORT.txt").write_text(f"{fmt}:{number}, of seed {seed.name}, exact={exact}\n\n{failure}\n")


def numbered(formats: Iterable[str], first: int, count: int) -> Iterator[Case]:
    """``count`` cases of every format, the formats in turn."""
    return ((fmt, number) for number, fmt in itertools.product(range(first, first + count), tuple(formats)))


def table(found: Campaign, formats: Iterable[str]) -> str:
    lines = [f"{'format':<12} {'cases':>7} {'valid':>7} {'failures':>8}  errors"]
    for fmt in formats:
        named = sorted(
            (count, name) for (held, name), count in found.outcomes.items() if held == fmt and name != "valid"
        )
        errors = ", ".join(f"{name} {count}" for count, name in reversed(named))
        failed = sum(case[0] == fmt for case in found.failures)
        lines.append(f"{fmt:<12} {found.count(fmt):>7} {found.outcomes[fmt, 'valid']:>7} {failed:>8}  {errors}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of all formats together")
    parser.add_argument("--first", type=int, default=0, help="number of the first case; another gives other files")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--case", action="append", help="FORMAT:NUMBER; only this one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for files that failed")
    args = parser.parse_args()
    cases = numbered(args.formats, args.first, -(-args.cases // len(args.formats)))
    if args.case:
        cases = ((fmt, int(number)) for fmt, _, number in (case.partition(":") for case in args.case))
    started = time.perf_counter()
    found = campaign(cases, processes=args.processes, keep=args.keep)
    print(table(found, args.formats))
    seconds, slowest = found.slowest
    print(
        f"{time.perf_counter() - started:.0f} s; the slowest case, {':'.join(map(str, slowest or ()))}, took {seconds:.2f} s"
    )
    for (fmt, number), failure in sorted(found.failures.items())[:20]:
        print(f"\n{fmt}:{number} {failure.strip().splitlines()[-1][:300]}")
    if found.failures:
        print(f"\n{len(found.failures)} failures; their files are in {args.keep}")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
