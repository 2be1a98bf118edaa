"""Biases of linear layers, which no model here has: some tools write them as zeros, and any other would change the answer."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy

__all__ = ["bias_notes", "is_zero", "refuse_biases"]

# Small tensors, which come one at a time from a hub.
THREADS = 8
_SIGNLESS = 0x7FFF


def refuse_biases(checkpoint: Checkpoint, reader: CheckpointReader, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are biases, all of zeros, in order.

    Raises:
        CheckpointError: one is not zero.
    """

    def check(name: str) -> None:
        info = checkpoint[name]
        if info.dtype not in FLOATS or not is_zero(as_numpy(reader.rows(info, 0, info.rows), info.dtype), info.dtype):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} is a bias that is not zero; the model computed here has no place for it"
            )

    found = sorted(name for name in names if name.endswith(".bias"))
    if found:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-mixtral-open") as pool:
            list(pool.map(check, found))
    return found


def is_zero(values: npt.NDArray[Any], dtype: str) -> bool:
    """Whether all values of a safetensors float type are 0 or -0."""
    return not (values & np.uint16(_SIGNLESS) if dtype == "BF16" else values).any()


def bias_notes(names: list[str]) -> tuple[str, ...]:
    """What to say of biases that are left out."""
    if not names:
        return ()
    count = "1 bias of zeros is" if len(names) == 1 else f"{len(names)} biases of zeros are"
    return (f"{count} left out, as {names[0]}",)
