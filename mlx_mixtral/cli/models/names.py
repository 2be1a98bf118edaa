"""Which models lie in the hub's cache, by the names of its folders alone: quick enough for a shell that completes a word.

The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
from pathlib import Path

from mlx_mixtral.errors import MixtralError
from mlx_mixtral.reading import MAX_CONFIG_BYTES, read_json

__all__ = ["cached_models", "hub_cache"]

_PREFIX = "models--"
_KINDS = ("mixtral", "mistral", "llama")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth")


def hub_cache() -> Path:
    """Where the hub's client keeps repositories; it reads the same variables."""
    get = os.environ.get
    home = get("HF_HOME") or f"{get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    return Path(os.path.expandvars(get("HF_HUB_CACHE", get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")))).expanduser()


def cached_models() -> list[str]:
    """``owner/name`` of each repository with weights of a model that runs here or that can be converted, as far as a look at
    its ``config.json`` tells; in order of name."""
    found = []
    try:
        folders = sorted(hub_cache().iterdir())
    except OSError:
        return []
    for folder in folders:
        parts = folder.name.removeprefix(_PREFIX).split("--")
        if folder.name.startswith(_PREFIX) and len(parts) == 2 and _may_be_ours(folder):
            found.append("/".join(parts))
    return found


def _may_be_ours(folder: Path) -> bool:
    try:
        snapshots = list((folder / "snapshots").iterdir())
    except OSError:
        return False
    return any(_has_model(snapshot) for snapshot in snapshots if snapshot.is_dir())


def _has_model(snapshot: Path) -> bool:
    try:
        names = os.listdir(snapshot)  # noqa: PTH208
        if not any(name.endswith(_WEIGHTS) for name in names):
            return False
        if "config.json" not in names:
            return any(name == "params.json" or name.endswith(".gguf") for name in names)
        kind = read_json(snapshot / "config.json", MAX_CONFIG_BYTES).get("model_type")
    except (OSError, MixtralError):
        return False
    return kind in _KINDS
