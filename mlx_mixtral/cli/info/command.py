"""``mlx-mixtral info``: what a model is, weighs and needs, without reading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import argument, flag, group, option, takes
from mlx_mixtral.cli.options import OverrideOptions, json_flag, revision_option
from mlx_mixtral.cli.values import ModelName

if TYPE_CHECKING:
    from mlx_mixtral.info.macs import Chip

__all__ = ["info"]


@dataclass(frozen=True)
class InfoOptions:
    model: str | None = argument(metavar="[MODEL|8x7b|8x22b]", required=False, type=ModelName())
    chip: str | None = option("--chip NAME", 'One chip only for the speed bound, such as "M2 Max".')
    revision: str | None = revision_option()
    memory: str | None = option(
        "--memory SIZE", "Show what would stay in memory under this budget, and how fast that is."
    )
    machines: str | None = option(
        "--machines GB,GB", "Show what each of several Macs would hold and the predicted speed, such as 64GB,64GB."
    )
    link: str | None = option(
        "--link KIND",
        "What connects --machines: thunderbolt (TCP), thunderbolt5 (RDMA), ethernet10g or wifi.  [default: thunderbolt]",
    )
    context: int | None = option("--context N", "Tokens that --memory and --machines reserve KV cache for.")
    disk: str | None = option("--disk SIZE", "Bytes the disk reads a second, such as 5GB.  [default: measured]")
    overrides: OverrideOptions = group(OverrideOptions)
    settings: bool = flag("--settings", "Show the defaults of your settings file, all of them checked; takes no MODEL.")
    as_json: bool = json_flag()


@click.command()
@click.pass_context
@takes(InfoOptions)
def info(ctx: click.Context, given: InfoOptions) -> None:
    """Show the size of MODEL and the memory it needs: a folder, a hub repository, or the published models 8x7b and 8x22b.

    It reads the configuration and file headers only, not the weights. The table of what fits assumes that the GPU may use
    2/3 of a Mac's memory below 36 GB and 3/4 from 36 GB up, as macOS recommends to Metal applications (newer versions allow
    more). The speed bound is the chip's published bandwidth divided by the bytes read per token: nothing can be faster.

    --memory prints the plan for a budget first: which layers keep all their experts, how many expert slots the others have,
    and the predicted tokens per second. Disk and memory speeds are measured here, or given by --disk and --chip.

    --machines plans one model on several Macs of the same chip, the leader first: what each would hold with layers split and
    with experts split, whether that fits, and the predicted tokens per second next to one machine. It is arithmetic from
    published latencies; no Mac was measured.
    """
    if given.settings:
        if given.model is not None:
            raise click.UsageError("--settings shows the file of defaults; leave out MODEL, or --settings")
        _show_settings(ctx, as_json=given.as_json)
        return
    if given.model is None:
        raise click.UsageError("give MODEL, 8x7b or 8x22b, or --settings")
    from mlx_mixtral.info.macs import find_chips

    _check_plans(given)
    chips = find_chips(given.chip)
    if given.model.lower() in ("8x7b", "8x22b"):
        _published(given, given.model.lower(), chips)
    else:
        _checkpoint(given, given.model, chips)


def _check_plans(given: InfoOptions) -> None:
    """Of two plans one, and options of plans only where there is one."""
    if given.memory is not None and given.machines is not None:
        raise click.UsageError("--memory plans one machine and --machines several; leave out one of them")
    if given.machines is None and given.link is not None:
        raise click.UsageError("--link applies only with --machines")
    if given.memory is None and given.machines is None and (given.context is not None or given.disk is not None):
        raise click.UsageError("--context and --disk apply only with --memory or --machines")


def _show_settings(ctx: click.Context, *, as_json: bool) -> None:
    from mlx_mixtral.cli.app import COMMANDS
    from mlx_mixtral.cli.info.tables import print_settings
    from mlx_mixtral.cli.settings import apply, read_settings

    settings, above = read_settings(COMMANDS), ctx.find_root()
    assert isinstance(above.command, click.Group)
    for name in settings.tables:
        command = above.command.get_command(above, name)
        assert command is not None
        apply(above, settings, name, command)
    if as_json:
        emit_json({"file": str(settings.path), "exists": settings.is_there, "settings": settings.tables})
    else:
        print_settings(settings)


def _published(given: InfoOptions, name: str, chips: Sequence[Chip]) -> None:
    from mlx_mixtral.cli.info.machines import print_machines
    from mlx_mixtral.cli.info.tables import print_plans, print_shape
    from mlx_mixtral.info.shape import shape_report

    report = shape_report(name, chips, given.overrides.checked)
    if given.memory is not None:
        from mlx_mixtral.info.plans import shape_plans

        report["memory"] = shape_plans(name, given.memory, given.context, chips, given.disk, given.overrides.checked)
    if given.machines is not None:
        from mlx_mixtral.info.machines import Cluster, shape_machines

        cluster = Cluster.parse(given.machines, given.link, chips, given.disk)
        report["machines"] = shape_machines(name, cluster, given.context, given.overrides.checked)
    if given.as_json:
        emit_json(report)
    elif given.memory is not None:
        print_plans(report["memory"])
    elif given.machines is not None:
        print_machines(report["machines"], f"Mixtral {name}")
    else:
        print_shape(report)


def _checkpoint(given: InfoOptions, model: str, chips: Sequence[Chip]) -> None:
    from mlx_mixtral.cli.info.machines import print_machines
    from mlx_mixtral.cli.info.tables import print_checkpoint, print_plans
    from mlx_mixtral.cli.progress import fetch
    from mlx_mixtral.info.checkpoint import checkpoint_report

    overrides = given.overrides.checked
    folder = fetch(model, revision=given.revision, weights=given.memory is not None)
    downloaded = not as_path("model", model).is_dir()
    facts = checkpoint_report(folder, chips, downloaded=downloaded, overrides=overrides)
    report = {"model": model, **facts}
    if given.memory is not None:
        from mlx_mixtral.info.plans import checkpoint_plan

        report["memory"] = checkpoint_plan(folder, given.memory, given.context, chips, given.disk, overrides)
    if given.machines is not None:
        from mlx_mixtral.info.machines import Cluster, checkpoint_machines

        cluster = Cluster.parse(given.machines, given.link, chips, given.disk)
        report["machines"] = checkpoint_machines(folder, report, cluster, given.context, overrides)
    if given.as_json:
        emit_json(report)
    elif given.memory is not None:
        print_plans([report["memory"]])
    elif given.machines is not None:
        print_machines(report["machines"], model)
    else:
        print_checkpoint(report, with_speed=given.chip is not None)
