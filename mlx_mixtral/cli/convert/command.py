"""``mlx-mixtral convert``: a checkpoint to MLX, quantised, or with ``--to`` to what other programs read."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_mixtral.cli.console import emit_json, note, one_line
from mlx_mixtral.cli.convert.options import ConvertOptions, check_options
from mlx_mixtral.cli.fields import takes
from mlx_mixtral.cli.several import refuse_in_group
from mlx_mixtral.errors import MixtralError

__all__ = ["convert"]

_HF_TYPES = {"auto": None, "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@click.command()
@click.pass_context
@takes(ConvertOptions)
def convert(ctx: click.Context, given: ConvertOptions) -> None:
    """Convert SOURCE, a folder, a GGUF file or a hub repository, to MLX weights in the new folder DEST.

    DEST appears complete or not at all. Memory use is small and does not depend on the size of the model. To resume an
    interrupted conversion, repeat the command.

    --to hf and --to gguf convert in the other direction: from MLX, or any other SOURCE, to the formats of other programs.
    Options that concern MLX's packing do not apply to them.
    """
    refuse_in_group("convert", "run it on one, without mlx.launch")
    check_options(ctx, given)
    if given.upload is not None:
        from mlx_mixtral_convert.upload.run import check_repository

        check_repository("--upload", given.upload)
    if given.to == "mlx":
        _convert(given)
    else:
        _export(given)
    if given.upload is not None:
        _upload(given, given.upload)


def _upload(given: ConvertOptions, repository: str) -> None:
    from mlx_mixtral.cli.upload import print_upload
    from mlx_mixtral.hub import Source
    from mlx_mixtral_convert.upload import upload as run

    try:
        found = run(
            given.dest,
            repository,
            public=given.public,
            base_model=Source.parse(given.source).repository,
            source=given.source,
            overwrite=given.overwrite,
        ).to_dict()
    except MixtralError as error:
        error.add_note(f"{given.dest} is complete: to try again, run mlx-mixtral upload {given.dest} {repository}")
        raise
    if not given.as_json:
        print_upload(found)
    for text in found["notes"]:
        note(f"note: {one_line(text)}")


def _convert(given: ConvertOptions) -> None:
    from mlx_mixtral.cli.convert.tables import conversion_progress, print_conversion
    from mlx_mixtral_convert import convert as run

    recipe = given.make_recipe()
    with conversion_progress(recipe.rounding) as progress:
        report = run(
            given.source,
            given.dest,
            recipe=recipe,
            dtype=given.dtype,
            revision=given.revision,
            adapters=given.adapters,
            exact=given.exact,
            kind=given.kind,
            overwrite=given.overwrite,
            restart=given.restart,
            stream=given.stream,
            dry_run=given.dry_run,
            calibration=given.calibration,
            fit=given.fit,
            context=given.context,
            progress=progress,
        )
    if given.as_json:
        emit_json(report.to_dict())
    else:
        print_conversion(given.source, Path(given.dest), report.to_dict())
    for text in report.notes:
        note(f"note: {one_line(text)}")


def _export(given: ConvertOptions) -> None:
    from mlx_mixtral.cli.convert.tables import conversion_progress, print_export
    from mlx_mixtral_convert.export import export as run

    with conversion_progress() as progress:
        report = run(
            given.source,
            given.dest,
            to=given.to,
            type=given.gguf_type if given.to == "gguf" else _HF_TYPES[given.dtype],
            kind=given.kind,
            revision=given.revision,
            overwrite=given.overwrite,
            dry_run=given.dry_run,
            calibration=given.calibration,
            progress=progress,
        )
    if given.as_json:
        emit_json(report.to_dict())
        return
    print_export(Path(given.dest), report.to_dict())
    for text in report.notes:
        note(f"note: {one_line(text)}")
