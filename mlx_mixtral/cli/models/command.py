"""``mlx-mixtral list``, ``pull`` and ``rm``: models in the hub's cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mixtral.cli.console import emit_json, note, one_line, out_console, plural, print_table
from mlx_mixtral.cli.fields import argument, flag, takes
from mlx_mixtral.cli.options import json_flag, revision_option
from mlx_mixtral.cli.values import ModelName
from mlx_mixtral.errors import CheckpointError, HubError, InvalidRequestError, MixtralError
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral.cli.models.cached import CachedModel, CachedRevision

__all__ = ["list_models", "pull", "rm"]


@dataclass(frozen=True)
class ListOptions:
    as_json: bool = json_flag()


@click.command("list")
@takes(ListOptions)
def list_models(given: ListOptions) -> None:
    """Show the models in the hub's cache: their size, and whether they run here or have to be converted first.

    Looks at configurations and file headers only. `pull` fetches a model, `rm` removes one. Folders that `convert` wrote are
    not in the cache and not listed.
    """
    from mlx_mixtral.cli.models.cached import cached
    from mlx_mixtral.cli.models.names import hub_cache

    models, _ = cached()
    found = [model.to_dict() for model in models]
    total = sum(model.nbytes for model in models)
    if given.as_json:
        emit_json({"cache": str(hub_cache()), "bytes": total, "models": found})
        return
    if not found:
        out_console().print(
            f"no models in {one_line(hub_cache())}; to download one, run mlx-mixtral pull owner/name", soft_wrap=True
        )
        return
    rows = [[one_line(item["model"]), format_bytes(item["bytes"]), _state(item)] for item in found]
    title = f"{plural(len(rows), 'model')}, {format_bytes(total)}, in {one_line(hub_cache())}"
    print_table(title, ["model", "on disk", "here"], rows)


def _state(item: dict[str, Any]) -> str:
    short = item["note"] if len(item["note"]) < 40 else ""
    return f"{item['state']} ({short})" if short else str(item["state"])


@dataclass(frozen=True)
class PullOptions:
    model: str = argument(type=ModelName())
    revision: str | None = revision_option()
    as_json: bool = json_flag()


@click.command()
@takes(PullOptions)
def pull(given: PullOptions) -> None:
    """Fetch MODEL, a repository of the hub, into the hub's cache, so that it is there when it is needed.

    Only the files that are read come: of weights in several formats one. What is there already is not fetched again, and an
    interrupted download goes on.
    """
    from mlx_mixtral.cli.models.cached import RUNS, state_of
    from mlx_mixtral.cli.progress import byte_progress
    from mlx_mixtral.hub import Source

    source = Source.parse(given.model, given.revision)
    if source.path is not None and source.path.exists():
        raise InvalidRequestError(f"{given.model} already exists outside the hub's cache; there is nothing to download")
    with byte_progress("downloading", visible=False) as show:
        place = source.resolve(convertible=True, progress=show)
    repository, commit = source.origin(place)
    folder = place.parent if place.is_file() else place
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state, why = state_of(folder)
    if given.as_json:
        emit_json(
            {"model": repository, "revision": commit, "folder": str(place), "bytes": size, "state": state, "note": why}
        )
        return
    out_console().print(f"{one_line(repository)}: {format_bytes(size)} in {one_line(place)}", soft_wrap=True)
    if state == RUNS:
        note(f"it runs as it is: mlx-mixtral generate {one_line(given.model)} -p TEXT")
    elif state == "convert first":
        note(f"it must be converted first: mlx-mixtral convert {one_line(given.model)} DEST")
    else:
        note(f"note: {state}: {one_line(why)}")


@dataclass(frozen=True)
class RmOptions:
    models: tuple[str, ...] = argument(metavar="MODEL...", nargs=-1, required=True, type=ModelName())
    yes: bool = flag("-y, --yes", "Do not ask.")
    dry_run: bool = flag("--dry-run", "Say what would be removed; remove nothing.")
    as_json: bool = json_flag()


@click.command()
@takes(RmOptions)
def rm(given: RmOptions) -> None:
    """Remove each MODEL, owner/name or owner/name@revision, from the hub's cache, and say how much room that gives.

    Asks first on a terminal; elsewhere --yes is needed. Folders of your own are never removed.
    """
    from mlx_mixtral.cli.models.cached import cached, removal

    models, cache = cached()
    chosen = list(dict.fromkeys(pair for name in given.models for pair in _chosen(name, models)))
    strategies = removal(cache, chosen)
    freed = sum(strategy.expected_freed_size for strategy in strategies)
    if not given.as_json or not (given.yes or given.dry_run):
        for model, revision in chosen:
            refs = f" ({', '.join(revision.refs)})" if revision.refs else ""
            note(f"{one_line(model.name)} at {one_line(revision.commit[:12])}{one_line(refs)}")
    if not given.dry_run:
        _ask(freed, yes=given.yes)
        for strategy in strategies:
            strategy.execute()
            _check_gone([*strategy.repos, *strategy.snapshots, *strategy.blobs])
    result = {
        "removed": [{"model": model.name, "commit": revision.commit} for model, revision in chosen],
        "freed_bytes": freed,
        "dry_run": given.dry_run,
    }
    if given.as_json:
        emit_json(result)
    else:
        out_console().print(f"{format_bytes(freed)} {'would be' if given.dry_run else ''} freed".replace("  ", " "))


def _chosen(name: str, models: list[CachedModel]) -> list[tuple[CachedModel, CachedRevision]]:
    """The revisions that a name means: all of a repository, or the one it names."""
    from mlx_mixtral.hub import Source

    source = Source.parse(name)
    if source.repository is None:
        what = (
            "is a folder or file of your own"
            if source.path and source.path.exists()
            else "is not of the form owner/name"
        )
        raise InvalidRequestError(
            f"{name} {what}; rm removes only models in the hub's cache, which mlx-mixtral list shows"
        )
    found = next((model for model in models if model.name == source.repository), None)
    if found is None:
        raise CheckpointError(f"{source.repository} is not in the hub's cache; to see what is, run mlx-mixtral list")
    asked = source.revision
    named = [each for each in found.revisions if asked is None or asked in each.refs or each.commit.startswith(asked)]
    if not named:
        there = ", ".join(each.commit[:12] for each in found.revisions)
        raise CheckpointError(f"{found.name} has no revision {asked} in the hub's cache; there are {there}")
    return [(found, each) for each in named]


def _ask(freed: int, *, yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidRequestError("rm asks for confirmation, but there is no terminal; give --yes")
    if not click.confirm(f"Remove, and free {format_bytes(freed)}?", err=True):
        raise MixtralError("nothing was removed")


def _check_gone(places: list[Path]) -> None:
    for place in places:
        if place.exists():
            raise HubError(f"{place} could not be removed; check its permissions")
