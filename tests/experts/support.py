"""Models with some of their experts on disk, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral import Mixtral, load
from mlx_mixtral.budget.slots import min_expert_bytes
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import Recipe, convert

PROMPT = "And God said unto him, Behold, I will make thee a great nation, and the"


def converted(folder: Path, **recipe: Any) -> Path:
    """The bundled checkpoint in another packing."""
    convert(checkpoint_path(), folder, recipe=Recipe(**recipe))
    return folder


def budget(model: Mixtral, share: float, context: int | None = None) -> int:
    """Bytes with which this share of the experts stays in memory, 0 the least possible."""
    needs, sizes = model.engine.planner.needs(context), model.residency.sizes
    experts = sum(sizes.expert_bytes) * sizes.num_experts
    return needs.min_bytes + int(share * experts)


def least(model: Mixtral) -> int:
    return min_expert_bytes(model.residency.sizes)


def streamed(folder: Path, share: float, **options: Any) -> Mixtral:
    with load(folder) as whole:
        size = budget(whole, share)
    model = load(folder, memory=size, **options)
    assert model.residency.is_streamed
    return model


def ids(model: Mixtral, text: str = PROMPT) -> list[int]:
    return model.tokenizer.encode(text)


def bits(array: mx.array) -> bytes:
    return np.asarray(array).tobytes()
