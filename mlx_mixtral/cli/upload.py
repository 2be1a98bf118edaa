"""``mlx-mixtral upload``: a conversion into a repository of the hub, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_mixtral.cli.console import emit_json, note, one_line, out_console
from mlx_mixtral.cli.fields import argument, flag, group, option, takes
from mlx_mixtral.cli.options import json_flag
from mlx_mixtral.cli.several import refuse_in_group
from mlx_mixtral.cli.values import Place
from mlx_mixtral.sizes import format_bytes

__all__ = ["UploadOptions", "print_upload", "upload"]


@dataclass(frozen=True)
class CardOptions:
    public: bool = flag("--public", "Make the repository public.  [default: private]")
    base_model: str | None = option(
        "--base-model OWNER/NAME", "The model this was made from.  [default: the repository it was converted from]"
    )
    licence: str | None = option(
        "--license NAME", "The licence, by the hub's name for it.  [default: that of the files or of the base model]"
    )


@dataclass(frozen=True)
class UploadOptions:
    path: Path = argument(type=Place("file", as_text=False))
    repository: str = argument()
    card: CardOptions = group(CardOptions)
    report: Path | None = option("--report FOLDER", "Folder that `mlx-mixtral report` wrote, for the card.")
    overwrite: bool = flag("--overwrite", "Replace the card and the weights that the repository has.")
    dry_run: bool = flag("--dry-run", "Verify and print the card; upload nothing.")
    as_json: bool = json_flag()


@click.command()
@click.pass_context
@takes(UploadOptions)
def upload(ctx: click.Context, given: UploadOptions) -> None:
    """Put PATH, a folder that `convert` wrote or a GGUF file, into REPOSITORY, owner/name of the hub, with a model card.

    It is verified first. After an interruption the same command goes on: what the hub has already is not sent again.
    """
    refuse_in_group("upload", "run it on one, without mlx.launch")
    from mlx_mixtral_convert.upload import upload as run

    found = run(
        given.path,
        given.repository,
        public=given.card.public,
        base_model=given.card.base_model,
        licence=given.card.licence,
        report=given.report,
        overwrite=given.overwrite,
        dry_run=given.dry_run,
        verified=_verified,
    ).to_dict()
    if given.as_json:
        emit_json(found)
    else:
        print_upload(found)
    for text in found["notes"]:
        note(f"note: {one_line(text)}")


def _verified() -> None:
    note("verified; uploading")


def print_upload(found: Mapping[str, Any]) -> None:
    """Where it is now, or with ``dry_run`` what would be there."""
    size = f"{len(found['files'])} files, {format_bytes(found['nbytes'])}"
    if found["dry_run"]:
        out_console().print(
            f"{one_line(found['repository'])} (dry run: nothing was uploaded): {size}\n", soft_wrap=True
        )
        click.echo(found["card"])
        return
    seen = "private" if found["private"] else "public"
    out_console().print(f"{one_line(found['url'])}: {size}, {seen}", soft_wrap=True)
