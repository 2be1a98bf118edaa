"""`mlx-mixtral doctor`: the checks of this machine as a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.console import emit_json, err_console, out_console
from mlx_mixtral.cli.options import device_option, json_flag, takes
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_mixtral.doctor import Diagnosis

__all__ = ["doctor"]


@dataclass(frozen=True)
class DoctorOptions:
    device: str | None = device_option()
    as_json: bool = json_flag("Machine-readable results on stdout.")


@click.command()
@takes(DoctorOptions)
def doctor(given: DoctorOptions) -> None:
    """Check that this machine computes what Mixtral needs; takes under a minute.

    Exit status 1 when a check fails. The output is what a bug report should hold.
    """
    from mlx_mixtral.doctor import run_doctor

    notes = err_console()
    if given.as_json or not notes.is_terminal:
        diagnosis = run_doctor()
    else:
        with notes.status("checking") as status:
            diagnosis = run_doctor(lambda name: status.update(f"checking {name}"))
    if given.as_json:
        emit_json(diagnosis.to_dict())
    else:
        _draw(diagnosis, out_console())
    if not diagnosis.passed:
        sys.exit(1)


def _draw(diagnosis: Diagnosis, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    device = diagnosis.device
    console.print(
        f"MLX {diagnosis.mlx_version} on {device.name} ({device.kind}), computing in {diagnosis.compute_dtype}"
    )
    if device.memory_bytes:
        recommended = format_bytes(device.recommended_bytes) if device.recommended_bytes else "not told"
        console.print(f"memory {format_bytes(device.memory_bytes)}, recommended working set {recommended}")
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "measured"):
        table.add_column(heading)
    for result in diagnosis.results:
        verdict = Text("ok", "green") if result.passed else Text("FAILED", "red")
        table.add_row(result.name, verdict, result.measured)
        if not result.passed:
            table.add_row("", "", Text(result.failure_means, "red"))
    console.print(table)
    console.print(
        f"memory copies at {format_bytes(diagnosis.memory_bytes_per_s)}/s, "
        f"disk reads at {format_bytes(diagnosis.disk_bytes_per_s)}/s"
    )
    failed = sum(not result.passed for result in diagnosis.results)
    console.print("everything holds" if not failed else f"{failed} of {len(diagnosis.results)} checks failed")
