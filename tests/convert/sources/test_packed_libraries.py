"""Folders that libraries quantised and saved: the weights mean what the library itself makes of them.

``tests/goldens/record_packed.py`` wrote them, and the logits of each library's own weights in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral_convert import Recipe, convert, verify

GOLDENS = Path(__file__).parents[2] / "goldens" / "packed"
WRITTEN_BY: dict[str, str] = json.loads((GOLDENS / "cases.json").read_text())
TOKENS = mx.array([[1, 5, 9, 30, 2, 17, 8, 31]])
KINDS = {"llm-compressor": "compressed-tensors", "transformers": "fp8"}
# What becomes of each with --exact, and the largest difference of logits that rounding may make.
EXACT: dict[str, tuple[str, str, float]] = {}


def logits(folder: Path) -> np.ndarray:
    model = load_model(folder)[0]
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))[0]


@pytest.mark.parametrize("case", WRITTEN_BY)
def test_the_weights_are_those_the_library_makes_of_them(tmp_path: Path, case: str) -> None:
    convert(GOLDENS / case, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    with np.load(GOLDENS / "logits.npz") as meant:
        wrong = np.abs(logits(tmp_path / "out") - meant[case]).max()
    print(f"{case}: {WRITTEN_BY[case]}, largest difference {wrong:.2g}")
    assert wrong < 3e-5


@pytest.mark.parametrize("case", WRITTEN_BY)
def test_exact(tmp_path: Path, case: str) -> None:
    report = convert(GOLDENS / case, tmp_path / "out", exact=True)
    with np.load(GOLDENS / "logits.npz") as meant:
        wrong = np.abs(logits(tmp_path / "out") - meant[case]).max()
    print(f"{case}: {WRITTEN_BY[case]}, {report.packings}, largest difference {wrong:.2g}, {report.output_bytes}")
    assert verify(tmp_path / "out").ok
