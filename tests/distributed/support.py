"""Models cut into shares within one process, without any communication."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.shares import Share, expert_shares, layer_shares
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.held import expert_group_size
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.fill import fill

EQUAL, UNEVEN = (1, 1), (3, 2, 1)


@dataclass
class Built:
    """A model that is complete, and what built it."""

    builder: Builder
    module: MixtralModel
    nbytes_read: int


def builder(folder: Path, share: Share | None = None, **options: Any) -> Builder:
    config, checkpoint = MixtralConfig.from_folder(folder), Checkpoint(folder)
    return Builder(config, checkpoint, "F32", products=products_for(current_device()), share=share, **options)


def built(
    folder: Path,
    share: Share | None = None,
    slots: Sequence[int] | None = None,
    overflow_slots: Mapping[int, int] | None = None,
    **options: Any,
) -> Built:
    made = builder(folder, share, **options)
    module, done = made.build(slots, overflow_slots), [0]
    with CheckpointReader(made.checkpoint) as reader:
        fill(reader, made.ranges, done.append)
    made.ranges.clear()
    return Built(made, module, done[-1])


def shares_of(folder: Path, split: str, weights: Sequence[float]) -> list[Share]:
    config = MixtralConfig.from_folder(folder)
    if split == "layers":
        return layer_shares(config, weights)
    return expert_shares(config, expert_group_size(config, Checkpoint(folder)), weights)


def array(value: mx.array) -> np.ndarray[Any, Any]:
    """A copy that outlives the model."""
    return np.array(value, copy=True)


def rewritten(folder: Path, out: Path, tensors: dict[str, mx.array], **changes: Any) -> None:
    """A folder of the configuration of another one, with other tensors."""
    out.mkdir()
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "mlx"})
    entries = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(entries | changes))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    checkpoint = Checkpoint(folder)
    found: dict[str, mx.array] = {}
    for file in checkpoint.files:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found
