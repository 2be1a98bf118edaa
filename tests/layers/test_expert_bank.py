"""The grouped products get what MLX's GPU kernels take for granted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral_convert import Recipe, convert
from tests.conftest import Loader


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_of_grouped_products_lie_one_behind_the_other(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_on_gpus: Loader,
    bits: int | None,
    *,
    is_streamed: bool,
) -> None:
    """The axis of length 1 has the rows' distance as its stride, or GPUs read other rows (ml-explore/mlx issue 4253)."""
    if bits is not None:
        convert(small, tmp_path / "4bit", recipe=Recipe(bits=bits))
        small = tmp_path / "4bit"
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def watched(real: Any) -> Any:
        def product(x: mx.array, *rest: Any, **options: Any) -> mx.array:
            if options["sorted_indices"]:
                mx.eval(x)
                view = memoryview(x)
                assert view.strides is not None
                seen.append((tuple(x.shape), tuple(stride // view.itemsize for stride in view.strides)))
            return real(x, *rest, **options)  # type: ignore[no-any-return]

        return product

    for name in ("gather_mm", "gather_qmm"):
        monkeypatch.setattr(mx, name, watched(getattr(mx, name)))
    with as_on_gpus(small) as model:
        least = model.min_memory_bytes
    with as_on_gpus(small, memory=least if is_streamed else None) as model:
        model.logits([int(i) for i in np.random.default_rng(0).integers(3, 256, 40)])
    assert seen
    for shape, strides in seen:
        assert (len(shape), shape[1]) == (3, 1)
        assert (strides[0], strides[2]) == (strides[1], 1)
