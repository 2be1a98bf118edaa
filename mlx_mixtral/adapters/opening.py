"""From what a user names as an adapter to an ``Adapter``: a local folder or a repository of the hub, told apart by content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters import mlx, peft
from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.adapters.parts import AdapterContents
from mlx_mixtral.adapters.places import Places
from mlx_mixtral.adapters.reader import FileAdapter
from mlx_mixtral.adapters.settings import CONFIG, MAX_SCALE
from mlx_mixtral.arguments import is_number, shown
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.hub import BytesDone, Source
from mlx_mixtral.reading import is_there, names_like, read_json
from mlx_mixtral.weights.safetensors import read_header

__all__ = ["open_adapter"]

MAX_CONFIG_BYTES = 4 * 2**20
_PICKLE = "adapter_model.bin"


def open_adapter(
    source: str | Path,
    config: MixtralConfig,
    *,
    scale: float = 1.0,
    revision: str | None = None,
    name: str | None = None,
    progress: BytesDone | None = None,
) -> Adapter:
    """The adapter in a folder, or in a repository ``owner/name[@revision]`` of the hub, for the model of ``config``.

    Reads its settings and the header of its weights; numbers are read when they are asked for.

    Args:
        scale: multiplies what the adapter changes; negative takes it away from the model, 0 leaves the model as it is.
        name: what errors call it; the folder's or the repository's when None.
        progress: told (done bytes, total bytes) while downloading.

    Raises:
        InvalidRequestError: ``scale`` is no finite number, or the adapter holds what cannot be scaled.
        CheckpointError: there is no adapter, one of a kind that is not read, of another model, or damaged.
        HubError: the repository cannot be used.
    """
    if not is_number(scale) or not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise InvalidRequestError(f"scale is {shown(scale)}; it must be a finite number of at most {MAX_SCALE:g}")
    named = Source.parse(source, revision)
    folder = named.resolve_adapter(progress=progress)
    name = name or named.origin(folder)[0]
    kind, file, entries = _choose(folder)
    tensors, places = read_header(file), Places(config)
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors; the adapter changes nothing")
    read = peft.read_peft if kind == "PEFT" else mlx.read_mlx
    contents = read(folder / CONFIG, entries, tensors, places)
    _check_scale(scale, contents, name)
    return FileAdapter(name, kind, file, contents, config, float(scale))


def _choose(folder: Path) -> tuple[str, Path, Mapping[str, Any]]:
    """The kind of an adapter, its weights and its settings."""
    ours, theirs = is_there(folder / mlx.WEIGHTS), is_there(folder / peft.WEIGHTS)
    if not is_there(folder / CONFIG):
        _refuse(folder, ours or theirs)
    entries = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    if ours and theirs:
        raise CheckpointError(
            f"{folder} holds adapters of PEFT ({peft.WEIGHTS}) and of mlx-lm ({mlx.WEIGHTS}), and one {CONFIG}; move one of "
            "them to another folder"
        )
    kind, weights, there = ("PEFT", peft.WEIGHTS, theirs) if "peft_type" in entries else ("mlx-lm", mlx.WEIGHTS, ours)
    if kind == "PEFT":
        peft.check_type(folder / CONFIG, entries)
    if not there:
        _refuse_weights(folder, kind, weights, ours or theirs)
    return kind, folder / weights, entries


def _refuse(folder: Path, weights: bool) -> None:
    """Raise the error for a folder without settings of an adapter."""
    if weights:
        raise CheckpointError(f"{folder} has an adapter's weights and no {CONFIG}, which says how they were trained")
    if names_like(folder, "*.gguf"):
        raise _gguf(folder.name, names_like(folder, "*.gguf")[0].name)
    if is_there(folder / "config.json") or is_there(folder / "params.json"):
        raise CheckpointError(f"{folder} holds a model, not an adapter: it has no {CONFIG}")
    raise CheckpointError(f"{folder} holds no adapter: it has no {CONFIG}")


def _refuse_weights(folder: Path, kind: str, wanted: str, others: bool) -> None:
    """Raise the error for settings of an adapter without the weights that belong to them."""
    if is_there(folder / _PICKLE):
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, which can run code when it is opened and is not read; write it as safetensors: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{_PICKLE}', weights_only=True), '{peft.WEIGHTS}')\""
        )
    if found := names_like(folder, "*.npz"):
        raise CheckpointError(
            f"{found[0]} is of an mlx-lm before March 2024; mx.save_safetensors('{mlx.WEIGHTS}', mx.load('{found[0].name}')) "
            "writes what is read"
        )
    if others:
        raise CheckpointError(
            f"{folder}: {CONFIG} is of {kind}, whose weights are in {wanted}, but there are weights of the other kind only"
        )
    raise CheckpointError(f"{folder} has {CONFIG} of {kind}, but no {wanted}; download it again")


def _gguf(where: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"{where} holds an adapter as GGUF ({file}), or a model; adapters are read as PEFT or mlx-lm wrote them: give the "
        "folder that it was made from"
    )


def _check_scale(scale: float, contents: AdapterContents, name: str) -> None:
    if scale == 1:
        return
    for what, paths in (("matrices or norms", contents.replaced), ("rows of tokens", contents.token_rows)):
        if paths:
            raise InvalidRequestError(
                f"scale is {scale:g}, but the adapter {name} replaces {what} ({next(iter(paths))}), which stand in place "
                "of the model's and have no scale; leave the scale out"
            )
