"""The order of a benchmark: every case on all backends in turn, once to warm up, then the repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from mlx_mixtral.bench.backend import Backend, Ours, Timing
from mlx_mixtral.bench.cases import Case, Cases, random_prompt
from mlx_mixtral.bench.measurements import OURS, BenchReport, Row
from mlx_mixtral.bench.several import measure_sums
from mlx_mixtral.bench.traffic import TokenTraffic
from mlx_mixtral.machine.bandwidth import copy_rates
from mlx_mixtral.machine.device import current_device, wired

__all__ = ["Opener", "run_bench"]

Opener = Callable[[], Backend]
Notes = Callable[[str], None]

WARM_UP_TOKENS = 2
COPY_REPEATS = 3


def run_bench(
    openers: Mapping[str, Opener],
    cases: Cases,
    vocab_size: int,
    report: BenchReport,
    *,
    in_turn: bool = True,
    note: Notes = lambda _: None,
) -> None:
    """Measure ``cases`` and fill in ``report`` as it goes, so that an interrupted run keeps what it has.

    Args:
        openers: load each backend, by name; ours first.
        in_turn: backends take turns, which drifting clocks and temperatures then meet alike; it needs memory for all of them.
            Without it each backend is loaded when the one before was closed.
        note: called with what comes next.
    """
    report.backends, report.in_turn = list(openers), in_turn
    groups = [list(openers)] if in_turn else [[name] for name in openers]
    report.rows = {case: Row(case, {name: [] for name in openers}) for case in cases.list}
    for group in groups:
        backends: dict[str, Backend] = {}
        try:
            for name in group:
                note(f"loading {name}")
                backends[name] = _open(name, openers[name], report)
            with wired(current_device(), None, _budget(backends)):
                _measure(backends, cases, vocab_size, report, note)
            if group == [OURS]:
                report.peak_memory_bytes = mx.get_peak_memory()
        finally:
            for backend in backends.values():
                backend.close()


def _open(name: str, opener: Opener, report: BenchReport) -> Backend:
    mx.reset_peak_memory()
    started = time.perf_counter()
    backend = opener()
    report.load_s[name] = time.perf_counter() - started
    report.weight_bytes[name] = backend.nbytes
    return backend


def _budget(backends: Mapping[str, Backend]) -> int | None:
    """What may be wired beside the recommended limit: our budget while nothing else is loaded."""
    ours = backends.get(OURS)
    return ours.model.residency.budget_bytes if isinstance(ours, Ours) and len(backends) == 1 else None


def _measure(backends: Mapping[str, Backend], cases: Cases, vocab_size: int, report: BenchReport, note: Notes) -> None:
    ours = backends.get(OURS)
    traffic = TokenTraffic(ours.model) if isinstance(ours, Ours) else None
    if isinstance(ours, Ours):
        note("copying in memory")
        report.copies += copy_rates(repeats=COPY_REPEATS)
    for number, case in enumerate(report.rows):
        row = report.rows[case]
        if case.kind == "decode" and traffic is not None:
            row.token_bytes = traffic.bytes_at(case.size + cases.tokens // 2)
        run = _preparing(case, cases, vocab_size, seed=number)
        for repeat in range(-1, cases.repeats):
            for name, backend in backends.items():
                if name in row.skipped:
                    continue
                note(
                    f"{case.kind} {case.size}: {name}, {'warming up' if repeat < 0 else f'{repeat + 1}/{cases.repeats}'}"
                )
                try:
                    timing = run(backend, repeat < 0)
                except Exception as error:
                    if name == OURS:
                        raise
                    # What another runtime cannot compute is a result; ours goes on without it.
                    reason = f"{type(error).__name__}: {error}"
                    for other in report.rows.values():
                        if not other.timings[name]:
                            other.skipped[name] = reason
                    continue
                if timing is None:
                    row.skipped[name] = "the memory budget does not hold that many rows at once"
                elif repeat >= 0:
                    row.timings[name].append(timing)
        for backend in backends.values():
            backend.go_to([])
    if isinstance(ours, Ours):
        report.copies += copy_rates(repeats=COPY_REPEATS)
        report.sums = measure_sums(ours.model)


def _preparing(case: Case, cases: Cases, vocab_size: int, seed: int) -> Callable[[Backend, bool], Timing | None]:
    """What one measurement of a case is: called with a backend and whether it only warms up."""
    if case.kind == "batch":
        prompts = [random_prompt(vocab_size, cases.batch_prompt, seed=1000 * seed + row) for row in range(case.size)]
        return lambda backend, warms: backend.batch(prompts, WARM_UP_TOKENS if warms else cases.tokens)
    prompt: Sequence[int] = random_prompt(vocab_size, case.size, seed)
    if case.kind == "prefill":
        return lambda backend, _: backend.prefill(prompt)

    def decode(backend: Backend, warms: bool) -> Timing:
        if warms:
            backend.go_to(prompt)
        return backend.decode(WARM_UP_TOKENS if warms else cases.tokens)

    return decode
