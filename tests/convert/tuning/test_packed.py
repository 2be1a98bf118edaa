"""What is kept of an expert's hidden units while it is packed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral_convert.calibration import states
from mlx_mixtral_convert.calibration.states import pieces
from mlx_mixtral_convert.tuning import packed
from mlx_mixtral_convert.tuning.packed import HiddenUnits, hidden_blocks


@pytest.mark.parametrize("held", [0, 2**25])
@pytest.mark.parametrize("units", [96, 256, 320])
def test_hidden_units_come_back_by_blocks_and_by_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int, held: int
) -> None:
    monkeypatch.setattr(packed, "UNITS", 128)
    monkeypatch.setattr(states, "PIECE", 70)
    monkeypatch.setattr(states, "HELD_BYTES", held)
    true = np.random.default_rng(0).standard_normal((150, units)).astype(np.float32)
    hidden = HiddenUnits(units, len(true), tmp_path)
    for block in hidden_blocks(units):
        for piece in pieces(len(true)):
            hidden.append(mx.array(true[piece, block]))
    for piece in pieces(len(true)):
        assert np.array_equal(np.array(hidden.of(piece)), true[piece])
        for block in hidden_blocks(units):
            assert np.array_equal(np.array(hidden.of(piece, block)), true[piece, block])
    hidden.close()
    assert list(tmp_path.iterdir()) == []
