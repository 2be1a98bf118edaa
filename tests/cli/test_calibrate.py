"""``calibrate``: what cannot be written is refused before the hours that measuring takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral import QuantizationSpec
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral_convert import Calibration
from tests.shared import SharedFolders, short_checkpoint

from .conftest import Invoke, assert_one_error


def test_a_calibration_is_written_with_progress_to_the_end_and_may_be_replaced(
    invoke: Invoke, shared: SharedFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One layer, one candidate of twelve, one sequence of four: each is a forward for every group of matrices.
    monkeypatch.setattr("mlx_mixtral_convert.calibration.run.SENSITIVITY_TOKENS", 256)
    monkeypatch.setattr("mlx_mixtral_convert.calibration.sensitivity.CANDIDATES", (QuantizationSpec(3, 64),))
    short = shared("one layer of the bundled checkpoint", lambda folder: short_checkpoint(folder, 1))
    flags = ("--tokens", 1024, "--json")
    result = invoke("calibrate", short, tmp_path / "file", *flags)
    assert json.loads(result.stdout)["tokens"] == 1024
    told = result.stderr.splitlines()
    assert re.fullmatch(r"calibrate: about [0-9.]+ s left", told[0])
    assert re.fullmatch(r"calibrate: layer 1/1, about [0-9.]+ s left", told[-1])
    assert not Calibration.load(tmp_path / "file").losses
    again = invoke("calibrate", short, tmp_path / "file", *flags, "--sensitivities", "--overwrite")
    assert again.stderr.splitlines()[0].endswith("left, most of it for --sensitivities")
    found = Calibration.load(tmp_path / "file")
    assert found.losses == json.loads(again.stdout)["losses"]
    assert found.anchors == json.loads(again.stdout)["anchors"]
    assert set(found.anchors) == {"plain", "search"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_places_that_cannot_be_written_are_refused_before_the_run(
    invoke: Invoke, checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral_convert.calibrate", lambda *_, **__: pytest.fail("it ran"))
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    before = (checkpoint_copy / "config.json").read_bytes()
    assert_one_error(invoke("calibrate", checkpoint_copy, thesis), "thesis.tex", "is not a calibration file")
    assert_one_error(invoke("calibrate", checkpoint_copy, checkpoint_copy / "config.json"), "lies in the source")
    assert_one_error(invoke("calibrate", checkpoint_copy, "/proc/file"), "/proc/file cannot be written")
    assert_one_error(invoke("calibrate", checkpoint_copy, ""), "empty name")
    assert thesis.read_text() == "years of work"
    assert (checkpoint_copy / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "thesis.tex"]


def test_a_trace_is_refused_before_the_run(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    RoutingTrace(np.array([[[0, 1]] * 3], np.uint16), 8).save(tmp_path / "routing.trace")
    flags = ("calibrate", tiny, tmp_path / "file", "--trace")
    asked = invoke(*flags, tmp_path / "routing.trace", "--sensitivities")
    assert_one_error(asked, "3 layers", "the model has 6", "--save-trace")
    assert invoke(*flags, tmp_path / "routing.trace").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["routing.trace"]


def test_text_is_given_or_written(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    result = invoke("calibrate", tiny, tmp_path / "file", "--written", tiny, "--text", text)
    assert (result.exit_code, "not both" in result.stderr) == (2, True)
    result = invoke("calibrate", tiny, tmp_path / "file", "--written", tmp_path / "nowhere")
    assert_one_error(result, "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
