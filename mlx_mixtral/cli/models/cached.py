"""What lies in the hub's cache, and what can be done with it here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_mixtral.cli.models.names import hub_cache
from mlx_mixtral.errors import ConfigError, HubError, MissingDependencyError, MixtralError
from mlx_mixtral.hub.failures import hub_errors
from mlx_mixtral.info.checkpoint import checkpoint_report
from mlx_mixtral.installing import how_to_install
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral_convert.sources import open_source

__all__ = ["RUNS", "CachedModel", "CachedRevision", "cached", "removal", "state_of"]

RUNS, CONVERT, PARTIAL, BROKEN, OTHER = "runs", "convert first", "no weights", "cannot be read", "not a Mixtral"
_FAMILY = ("mixtral", "mistral", "llama")
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.npz", "*.pt", "*.pth")


@dataclass(frozen=True)
class CachedRevision:
    """A commit of a repository, with the branches and tags that name it; ``nbytes`` may be shared with other revisions."""

    commit: str
    refs: tuple[str, ...]
    folder: Path
    nbytes: int
    modified: float


@dataclass(frozen=True)
class CachedModel:
    """A repository in the cache, the revision that is used first."""

    name: str
    nbytes: int
    revisions: tuple[CachedRevision, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``list --json`` prints it."""
        state, why = state_of(self.revisions[0].folder)
        return {
            "model": self.name,
            "bytes": self.nbytes,
            "state": state,
            "note": why,
            "revisions": [
                {"commit": each.commit, "refs": list(each.refs), "bytes": each.nbytes, "folder": str(each.folder)}
                for each in self.revisions
            ],
        }


def cached() -> tuple[list[CachedModel], Any]:
    """Models in the cache in order of name, and the client's own view of it, which can remove revisions.

    Raises:
        HubError: the cache cannot be read.
        MissingDependencyError: the hub's client is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingDependencyError(
            f"the hub's cache needs huggingface-hub: {how_to_install('huggingface-hub')}"
        ) from error
    with hub_errors("the hub's cache"):
        try:
            info = hub.scan_cache_dir(hub_cache())
        except hub.CacheNotFound:
            return [], None
        except (OSError, ValueError) as error:
            raise HubError(f"it cannot be read: {error}") from error
    models = [
        CachedModel(repo.repo_id, repo.size_on_disk, tuple(_revisions(repo.revisions)))
        for repo in info.repos
        if repo.repo_type == "model" and repo.revisions
    ]
    return sorted(models, key=lambda model: model.name.lower()), info


def removal(info: Any, chosen: Iterable[tuple[CachedModel, CachedRevision]]) -> list[Any]:
    """What the client would do to remove these revisions, one strategy for each repository."""
    by_name: dict[str, list[str]] = {}
    for model, revision in chosen:
        by_name.setdefault(model.name, []).append(revision.commit)
    # The client goes by commits alone, and two repositories may have one in common.
    alone = {
        name: replace(info, repos=frozenset(r for r in info.repos if (r.repo_type, r.repo_id) == ("model", name)))
        for name in by_name
    }
    return [alone[name].delete_revisions(*commits) for name, commits in by_name.items()]


def _revisions(found: Iterable[Any]) -> Iterator[CachedRevision]:
    made = (
        CachedRevision(
            each.commit_hash, tuple(sorted(each.refs)), each.snapshot_path, each.size_on_disk, each.last_modified
        )
        for each in found
    )
    return iter(sorted(made, key=lambda each: ("main" not in each.refs, -each.modified)))


def state_of(folder: Path) -> tuple[str, str]:
    """What can be done with a folder, and why not more: from its configuration and the headers of its files.

    Returns:
        One of: it runs, it has to be converted first, its weights are not here, it cannot be read, or it is another model.
    """
    has_weights = any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not _is_family(folder):
        return OTHER, _kind(folder)
    if not has_weights:
        return PARTIAL, "only its small files are here"
    try:
        report = checkpoint_report(folder, ())
    except MixtralError as error:
        problem = str(error)
    else:
        if report["problem"] is None:
            return RUNS, f"{report['bits_per_weight']:.3g} bits per weight"
        problem = str(report["problem"])
    for place in (folder, *sorted(folder.glob("*.gguf"))[:1]):
        try:
            with closing(open_source(place)) as source:
                return CONVERT, f"{type(source).__name__.removesuffix('Source')} weights"
        except ConfigError as error:
            if place.suffix == ".gguf":
                return OTHER, str(error)
        except MixtralError:
            continue
    return BROKEN, problem


def _is_family(folder: Path) -> bool:
    if is_there(folder / "config.json"):
        return _kind(folder) in _FAMILY
    return is_there(folder / "params.json") or any(folder.glob("*.gguf"))


def _kind(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("model_type"))[:40]
    except MixtralError:
        return "no configuration"
