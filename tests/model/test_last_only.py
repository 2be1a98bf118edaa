"""The last token alone is what it is among all of them, and leaves the cache as they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral_convert import Recipe, convert

PACKINGS: dict[str, dict[str, Any] | None] = {
    "one matrix, unquantised": None,
    "one matrix, 4 bits": {},
    "q apart from k and v": {"*.q_proj": {"bits": 8}},
    "three matrices": {"*.q_proj": {"bits": 8}, "*.v_proj": {"bits": 6}},
}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "8 bits": {"kv_bits": 8}, "a ring": {"kv_size": 24, "kv_sinks": 0}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_last_token_alone(small: Path, tmp_path: Path, packing: str, kind: str) -> None:
    overrides = PACKINGS[packing]
    if overrides is not None:
        convert(small, tmp_path / "model", recipe=Recipe(bits=4, overrides=overrides))
        small = tmp_path / "model"
    tokens = mx.array(np.random.default_rng(0).integers(3, 256, (2, 40)), mx.int32)
    with load(small, **KINDS[kind]) as model:
        module, whole, last, remembered = model.module, *(model.make_cache([0, 3]) for _ in range(3))
        for start, stop in ((0, 20), (20, 37), (37, 40)):
            part = tokens[:, start:stop]
            wanted = module.hidden(part, whole)[:, -1:]
            got = module.hidden(part, last, last_only=True)
            assert np.abs(np.asarray(got) - np.asarray(wanted)).max() < 1e-4
            module.remember(part, remembered)
            mx.eval(whole.arrays, last.arrays, remembered.arrays)
            for other in (last, remembered):
                for one, two in zip(whole.arrays, other.arrays, strict=True):
                    assert np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64)).max() < 1e-4
