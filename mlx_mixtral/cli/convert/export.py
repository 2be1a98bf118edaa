"""``mlx-mixtral convert --to hf`` and ``--to gguf``: which options apply, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mlx_mixtral.cli.console import emit_json, note, one_line, out_console, seconds
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral_convert.export import ExportReport

__all__ = ["EXPORTS", "GGUF_TYPES", "export"]

EXPORTS = ("hf", "gguf")
GGUF_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_HF_TYPES = {"auto": None, "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_SHARED = {"source", "dest", "to", "gguf_type", "dtype", "kind", "overwrite", "dry_run", "revision", "as_json"}


def export(ctx: click.Context) -> None:
    """Run ``convert`` with the options of ``ctx``, whose ``--to`` is one of ``EXPORTS``."""
    given, to = ctx.params, ctx.params["to"]
    for name in given:
        if name not in _SHARED - {"dtype" if to == "gguf" else "gguf_type"} and _is_given(ctx, name):
            flag = next(param.opts[0] for param in ctx.command.params if param.name == name)
            instead = {"dtype": "; give --type", "gguf_type": "; give --dtype"}.get(name, "")
            raise click.UsageError(f"{flag} does not apply with --to {to}{instead}")

    from mlx_mixtral.cli.convert.tables import conversion_progress
    from mlx_mixtral_convert.export import export as run

    source, dest = given["source"], given["dest"]
    with conversion_progress() as progress:
        report = run(
            source,
            dest,
            to=to,
            type=given["gguf_type"] if to == "gguf" else _HF_TYPES[given["dtype"]],
            kind=given["kind"],
            revision=given["revision"],
            overwrite=given["overwrite"],
            dry_run=given["dry_run"],
            progress=progress,
        )
    if given["as_json"]:
        emit_json(report.to_dict())
    else:
        _print(Path(dest), report)


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)


def _print(dest: Path, report: ExportReport) -> None:
    console = out_console()
    planned = " (dry run: nothing was written)" if report.dry_run else ""
    console.print(f"{one_line(dest)}{planned}", style="bold", soft_wrap=True)
    line = f"{format_bytes(report.source_bytes)} -> {format_bytes(report.output_bytes)}, {report.type}"
    console.print(f"{line}, {report.bits_per_weight:.2f} bits per weight")
    if report.dry_run:
        needed, free = format_bytes(report.disk_needed_bytes), format_bytes(report.disk_free_bytes)
        console.print(f"{needed} of disk needed, {free} free")
        if report.disk_needed_bytes > report.disk_free_bytes:
            missing = format_bytes(report.disk_needed_bytes - report.disk_free_bytes)
            console.print(f"A real run would be refused for lack of disk: {missing} more are needed.")
    else:
        if report.packed_matrices and report.format == "gguf":
            console.print(
                f"{report.exact_matrices} of {report.packed_matrices} quantised matrices carried over exactly"
            )
        console.print(f"{seconds(report.seconds)}, peak memory {format_bytes(report.peak_memory_bytes)}")
    for text in report.notes:
        note(f"note: {text}")
