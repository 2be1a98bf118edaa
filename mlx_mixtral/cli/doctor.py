"""`mlx-mixtral doctor`: the checks of this machine, each as it ends."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.console import emit_json, note, out_console
from mlx_mixtral.cli.fields import takes
from mlx_mixtral.cli.options import device_option, json_flag
from mlx_mixtral.cli.several import own_group
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral.doctor import CheckResult, Diagnosis
    from mlx_mixtral.doctor.several import GroupDiagnosis

__all__ = ["doctor"]

# Columns of a check's name, and of how it went.
NAME, VERDICT = 27, 8


@dataclass(frozen=True)
class DoctorOptions:
    device: str | None = device_option()
    as_json: bool = json_flag("Machine-readable results on stdout.")


@click.command()
@takes(DoctorOptions)
def doctor(given: DoctorOptions) -> None:
    """Check that this machine computes what Mixtral needs: seconds on a CPU; on a GPU longer the first time, for its kernels.

    Exits with status 1 if a check fails. Include the output in bug reports.
    """
    from mlx_mixtral.doctor import run_doctor
    from mlx_mixtral.machine.device import current_device

    several = _check_group()
    if current_device().kind != "cpu":
        note("MLX compiles each kernel on first use, which takes a few seconds: the checks take longer the first time")
    if given.as_json:
        diagnosis = run_doctor()
        emit_json(diagnosis.to_dict() | ({} if several is None else {"group": several.to_dict()}))
    else:
        _print_machine()
        diagnosis = run_doctor(_print_name, _print_result)
        _print_summary(diagnosis)
    if not diagnosis.passed:
        sys.exit(1)


def _check_group() -> GroupDiagnosis | None:
    """On several machines: what a sum over them costs. All but the first end here."""
    group = own_group()
    if group is None:
        return None
    from mlx_mixtral.distributed.cost import sums_per_token
    from mlx_mixtral.distributed.deadline import end_process
    from mlx_mixtral.distributed.group import DEFAULT_PEER_TIMEOUT_S, Group
    from mlx_mixtral.doctor.several import diagnose_group

    found = diagnose_group(Group(group, DEFAULT_PEER_TIMEOUT_S))
    if group.rank():
        end_process("", 0)
    note(
        f"{found.machines} machines: a sum of one token's states takes {found.sum_s * 1e3:.2f} ms, a large one runs at "
        f"{format_bytes(found.bytes_per_s)}/s, and all have the same bits"
    )
    ms = found.sum_s * 1e3
    small, large = (sums_per_token("experts", found.machines, layers) * ms for layers in (32, 56))
    layers_ms = sums_per_token("layers", found.machines, 32) * ms
    note(
        f"with --split experts, a token waits {small:.1f} ms for sums in 8x7B and {large:.1f} ms in 8x22B; with --split "
        f"layers, {layers_ms:.1f} ms"
    )
    if found.is_slow:
        note("that is slow: is it Wi-Fi? connect the machines by Thunderbolt, and see docs/several-macs.md")
    return found


def _print_machine() -> None:
    from mlx_mixtral.layers.cpu import products_for
    from mlx_mixtral.machine.device import compute_dtype, current_device

    console, device = out_console(), current_device()
    dtype = compute_dtype("auto", device)
    console.print(f"MLX {version('mlx')} on {device.name} ({device.kind}), computing in {dtype}", soft_wrap=True)
    if device.kind == "cpu":
        console.print(products_for(device).description, soft_wrap=True)
    if device.memory_bytes:
        recommended = format_bytes(device.recommended_bytes) if device.recommended_bytes else "unknown"
        console.print(f"memory {format_bytes(device.memory_bytes)}, recommended working set {recommended}")
    console.print(f"{'check':<{NAME + VERDICT}}measured", style="bold")


def _print_name(name: str) -> None:
    """The check that runs now: its line goes on when it ends."""
    if name != "bandwidths":
        console = out_console()
        console.print(f"{name:<{NAME}}", end="")
        console.file.flush()


def _print_result(result: CheckResult) -> None:
    console = out_console()
    verdict, style = ("ok", "green") if result.passed else ("FAILED", "red")
    console.print(f"{verdict:<{VERDICT}}", style=style, end="")
    margin = " " * (NAME + VERDICT)
    width = max(console.width - len(margin), 20)
    lines: list[tuple[str, str | None]] = [(line, None) for line in textwrap.wrap(result.measured, width)]
    if not result.passed:
        lines += [(line, "red") for line in textwrap.wrap(result.failure_means, width)]
    for index, (line, colour) in enumerate(lines):
        console.print(f"{margin * (index > 0)}{line}", style=colour, soft_wrap=True)
    console.file.flush()


def _print_summary(diagnosis: Diagnosis) -> None:
    console = out_console()
    console.print(
        f"memory copies at {format_bytes(diagnosis.memory_bytes_per_s)}/s, "
        f"disk reads at {format_bytes(diagnosis.disk_bytes_per_s)}/s"
    )
    failed = sum(not result.passed for result in diagnosis.results)
    console.print("all checks passed" if not failed else f"{failed} of {len(diagnosis.results)} checks failed")
