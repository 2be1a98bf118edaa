"""A calibration file from a stranger: what ``save`` cannot have written is refused, and so is more than memory holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_mixtral.errors import CheckpointError, ConversionError, MemoryBudgetError
from mlx_mixtral.machine.memory import SystemMemory
from mlx_mixtral_convert import Recipe, calibrate, convert
from mlx_mixtral_convert.calibration import walk
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.calibration.place import FORMAT

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def made(short: Path) -> Calibration:
    return calibrate(short, tokens=1024, sensitivities=False)


def _nan(arrays: Arrays, header: dict[str, Any]) -> None:
    next(array for name, array in arrays.items() if name.startswith("squares."))[0, 0] = np.nan


def _negative(arrays: Arrays, header: dict[str, Any]) -> None:
    next(array for name, array in arrays.items() if name.startswith("routed."))[0] = -1


def _tokens(value: np.ndarray[Any, Any]) -> Callable[[Arrays, dict[str, Any]], None]:
    return lambda arrays, header: arrays.update(tokens=value)


def _one_left(arrays: Arrays, header: dict[str, Any]) -> None:
    del arrays[next(name for name in arrays if name.startswith("routed."))]


def _transposed(arrays: Arrays, header: dict[str, Any]) -> None:
    name = next(name for name, array in arrays.items() if name.startswith("squares.") and len(array) > 1)
    arrays[name] = np.ascontiguousarray(arrays[name].T)


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (_nan, "values that no input can have"),
        (_negative, "values that no input can have"),
        (_tokens(np.zeros((2, 2), np.float32)), "tokens are not token ids"),
        (_tokens(np.zeros((0, 2), np.int32)), "tokens are not token ids"),
        (_tokens(np.full((2, 2), -1, np.int32)), "tokens are not token ids"),
        (_one_left, "belong to other matrices"),
        (_transposed, "another shape or type"),
        (lambda arrays, header: header.update(losses=[1]), "does not describe a model"),
        (lambda arrays, header: header.update(identity=7), "does not describe a model"),
        (lambda arrays, header: header.update(losses={"all": {"4-bit g64": float("nan")}}), "losses are not numbers"),
        (lambda arrays, header: header.update(losses={"all": 3}), "losses are not numbers"),
        (lambda arrays, header: header.update(losses=json.loads("[" * 500 + "]" * 500)), "nested more than 100 levels"),
        (lambda arrays, header: header.pop("losses"), "cannot be read: 'losses'"),
    ],
)
def test_what_was_never_saved_is_refused(
    made: Calibration, tmp_path: Path, bend: Callable[[Arrays, dict[str, Any]], Any], said: str
) -> None:
    made.save(tmp_path / "file")
    arrays, header = load_file(tmp_path / "file"), json.loads(made._header())
    bend(arrays, header)
    save_file(arrays, tmp_path / "file", {FORMAT: json.dumps(header)})
    with pytest.raises(CheckpointError, match=said):
        Calibration.load(tmp_path / "file")


def test_a_header_nested_thousands_deep_is_one_line(made: Calibration, tmp_path: Path) -> None:
    for depth in (3000, 100_000):
        save_file({"tokens": made.tokens}, tmp_path / "file", {FORMAT: '{"losses": ' + "[" * depth + "]" * depth + "}"})
        with pytest.raises(CheckpointError, match=r"nested more than 100 levels|is not valid JSON"):
            Calibration.load(tmp_path / "file")


def test_tokens_beyond_the_vocabulary_do_not_reach_the_model(made: Calibration, short: Path, tmp_path: Path) -> None:
    tokens = made.tokens.copy()
    tokens[0, 0] = 2**20
    with pytest.raises(ConversionError, match="tokens that this model does not have"):
        convert(short, tmp_path / "out", recipe=Recipe(rounding="gptq"), calibration=replace(made, tokens=tokens))


def test_more_than_memory_holds_is_refused_before_it_is_allocated(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "read_system_memory", lambda: SystemMemory(2**21, 2**21))
    with pytest.raises(MemoryBudgetError, match=r"calibrating this model takes .* is free; close other"):
        calibrate(short, tokens=1024, sensitivities=False)
