"""``mlx-mixtral info``: what a model is, weighs and needs, without reading its weights."""

from __future__ import annotations

import click

from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.options import json_option

__all__ = ["info"]


@click.command(short_help="Show what a model is, weighs and needs.")
@click.argument("model", metavar="MODEL|8x7b|8x22b")
@click.option("--chip", metavar="NAME", help='One chip only for the speed bound, such as "M2 Max".')
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub repository.")
@click.option(
    "--memory", metavar="SIZE", help="Show what would stay in memory under this budget, and how fast that is."
)
@click.option("--context", type=int, metavar="N", help="Tokens that --memory reserves KV cache for.")
@click.option("--disk", metavar="SIZE", help="Bytes the disk reads a second, such as 5GB.  [default: measured]")
@json_option
def info(
    model: str,
    chip: str | None,
    revision: str | None,
    memory: str | None,
    context: int | None,
    disk: str | None,
    as_json: bool,
) -> None:
    """Show what MODEL is, weighs and needs: a folder, a hub repository, or the published sizes 8x7b and 8x22b.

    Reads configuration and file headers, never weights. What fits a Mac assumes that its GPU may use 2/3 of the memory
    below 36 GB and 3/4 from there on, which is what macOS recommends to Metal applications (newer versions allow more).
    Speed bounds are the chip's published bandwidth over the bytes read for one token: no implementation can be faster.

    With --memory the plan for a budget comes first: which layers keep all experts, how many slots the others have, and the
    tokens a second predicted from the speeds of disk and memory, measured here or given by --disk and --chip.
    """
    from mlx_mixtral.info.macs import find_chips

    if memory is None and (context is not None or disk is not None):
        raise click.UsageError("--context and --disk apply with --memory only")
    chips = find_chips(chip)
    if model.lower() in ("8x7b", "8x22b"):
        from mlx_mixtral.cli.info.shape import print_shape, shape_report

        shape = shape_report(model.lower(), chips)
        if memory is not None:
            from mlx_mixtral.cli.info.memory import print_plans, shape_plans

            shape["memory"] = shape_plans(model.lower(), memory, context, chips, disk)
        if as_json:
            emit_json(shape)
        elif memory is not None:
            print_plans(shape["memory"])
        else:
            print_shape(shape)
        return

    from mlx_mixtral.cli.info.checkpoint import checkpoint_report, print_checkpoint
    from mlx_mixtral.cli.progress import fetch

    folder = fetch(model, revision=revision, weights=memory is not None)
    downloaded = not as_path("model", model).is_dir()
    report = {"model": model, **checkpoint_report(folder, chips, downloaded=downloaded)}
    if memory is not None:
        from mlx_mixtral.cli.info.memory import folder_plan, print_plans

        report["memory"] = folder_plan(folder, memory, context, chips, disk, "auto")
    if as_json:
        emit_json(report)
        return
    if memory is not None:
        print_plans([report["memory"]])
    else:
        print_checkpoint(report, with_speed=chip is not None)
