"""PEFT (being written)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters.parts import Contents
from mlx_mixtral.adapters.places import Places
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import TensorInfo

WEIGHTS = "adapter_model.safetensors"


def check_type(config_file: Path, entries: Mapping[str, Any]) -> None:
    pass


def read_peft(
    config_file: Path, entries: Mapping[str, Any], tensors: Mapping[str, TensorInfo], places: Places
) -> Contents:
    raise CheckpointError("not yet")
