"""What this project assumes about the machine it runs on, checked there in under a minute.

Everything is developed on MLX's CPU backend; what is assumed about Metal follows its documentation. Each assumption is a check
here that runs the code the model runs, on the user's device, against an independent computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mlx_mixtral.doctor.checks import CHECKS, Check, CheckFailedError
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.bandwidth import disk_bandwidth, memory_bandwidth
from mlx_mixtral.machine.device import Device, compute_dtype, current_device

__all__ = ["CheckResult", "Diagnosis", "run_doctor"]


@dataclass(frozen=True)
class CheckResult:
    """One check: whether it held, what was measured, and what a failure means for the user."""

    name: str
    passed: bool
    measured: str
    failure_means: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """All results, the machine they are of, and two rates in bytes per second."""

    mlx_version: str
    device: Device
    compute_dtype: str
    results: tuple[CheckResult, ...]
    memory_bytes_per_s: float
    disk_bytes_per_s: float

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "mlx_version": self.mlx_version,
            "device": vars(self.device),
            "compute_dtype": self.compute_dtype,
            "products": products_for(self.device).description,
            "results": [vars(result) for result in self.results],
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "disk_bytes_per_s": self.disk_bytes_per_s,
        }


def run_doctor(
    progress: Callable[[str], None] | None = None, finished: Callable[[CheckResult], None] | None = None
) -> Diagnosis:
    """Run every check; one that breaks down counts as failed.

    Args:
        progress: told the name of each before it runs.
        finished: told the result of each.
    """
    device = current_device()
    dtype = compute_dtype("auto", device)
    results = []
    for check in CHECKS:
        if progress is not None:
            progress(check.name)
        results.append(_run(check, dtype))
        if finished is not None:
            finished(results[-1])
    if progress is not None:
        progress("bandwidths")
    return Diagnosis(version("mlx"), device, dtype, tuple(results), memory_bandwidth(), disk_bandwidth())


def _run(check: Check, dtype: str) -> CheckResult:
    started = time.perf_counter()
    try:
        passed, measured = True, check.run(dtype)
    except CheckFailedError as failure:
        passed, measured = False, str(failure)
    except Exception as error:  # whatever breaks down, the other checks still say something
        passed, measured = False, f"{type(error).__name__}: {error}"
    return CheckResult(check.name, passed, measured, check.failure_means, time.perf_counter() - started)
