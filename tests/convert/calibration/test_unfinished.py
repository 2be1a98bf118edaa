"""An interrupted calibration: the same call goes on after its last layer, with the same bytes."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import DestinationError, DiskSpaceError, NonFiniteWeightsError
from mlx_mixtral_convert import Calibration, CalibrationProgress, calibrate
from mlx_mixtral_convert.calibration import unfinished as module
from tests.shared import SharedFolders, random_checkpoint, short_checkpoint


@pytest.fixture(autouse=True)
def small_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One packing of twelve, one sequence of four; every layer is kept, however quick it was."""
    monkeypatch.setattr("mlx_mixtral_convert.calibration.run.SENSITIVITY_TOKENS", 256)
    monkeypatch.setattr("mlx_mixtral_convert.calibration.sensitivity.CANDIDATES", (QuantizationSpec(3, 64),))
    monkeypatch.setattr(module, "LEAST_RATIO", 0.0)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)


@pytest.fixture
def source(shared: SharedFolders) -> Path:
    return shared("two layers of the bundled checkpoint", lambda folder: short_checkpoint(folder, 2))


def interrupted(source: Path, place: Path, layer: int, error: BaseException | None = None, **options: Any) -> Any:
    """A calibration that ends in ``error`` once ``layer`` layers are done; what was raised."""

    def stop(at: CalibrationProgress) -> None:
        if at.layer == layer and at.share < 1:
            seen.append(at)
        # The first word of the next layer: this one has been kept.
        if len(seen) > 1:
            raise error or KeyboardInterrupt

    seen: list[CalibrationProgress] = []
    with pytest.raises(type(error) if error else KeyboardInterrupt) as caught:
        calibrate(source, tokens=1024, save=place, progress=stop, **options)
    return caught.value


def journal(place: Path) -> Path:
    return place.with_name(f"{place.name}.journal")


@pytest.mark.parametrize("layer", [1, 2])
def test_it_goes_on_after_the_last_layer_with_the_same_bytes(
    source: Path, tmp_path: Path, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with states in files, as those of a longer text are."""
    calibrate(source, tokens=1024, sensitivities=True).save(tmp_path / "whole")
    place = tmp_path / "file"
    monkeypatch.setattr("mlx_mixtral_convert.calibration.states.HELD_BYTES", 2**18)
    error = interrupted(source, place, layer, sensitivities=True)
    assert "finished layers are kept in" in error.__notes__[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.journal", "whole"]
    seen: list[int] = []
    calibrate(source, tokens=1024, sensitivities=True, save=place, progress=lambda at: seen.append(at.layer))
    assert seen[0] == layer
    assert place.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "whole"]


def test_without_sensitivities_it_goes_on_as_well(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", vocab_size=4096)
    tokenizer = Path(module.__file__).parents[3] / "mlx_mixtral" / "demo" / "tiny-mixtral" / "tokenizer.model"
    (tmp_path / "source" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    calls: list[float] = []

    def stop(at: CalibrationProgress) -> None:
        calls.append(at.share)
        if at.layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "source", tokens=1024, save=tmp_path / "file", progress=stop)
    assert journal(tmp_path / "file").exists()
    calibrate(tmp_path / "source", tokens=1024, save=tmp_path / "file")
    calibrate(tmp_path / "source", tokens=1024).save(tmp_path / "whole")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_options_and_other_files_are_refused_until_restart(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "file"
    interrupted(source, place, 1, sensitivities=True)
    kept = journal(place).read_bytes()
    with pytest.raises(DestinationError, match=r"unfinished calibration with other sensitivities; .* --restart"):
        calibrate(source, tokens=1024, save=place)
    with pytest.raises(DestinationError, match="with other text"):
        calibrate(source, tokens=1536, sensitivities=True, save=place)
    assert journal(place).read_bytes() == kept
    calibrate(source, tokens=1024, save=place, restart=True)
    assert not Calibration.load(place).losses
    assert not journal(place).exists()
    for content in (b"years of work", kept[:-10], b""):
        journal(place).write_bytes(content)
        for restart in (False, True):
            with pytest.raises(DestinationError, match="is not the journal of a calibration; move it,"):
                calibrate(source, tokens=1024, save=place, restart=restart)
        assert journal(place).read_bytes() == content


def test_a_source_that_was_changed_is_refused(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    short_checkpoint(copy, 2)
    interrupted(copy, tmp_path / "file", 1, sensitivities=True)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-64, io.SEEK_END)
        file.write(bytes(64))
    with pytest.raises(DestinationError, match="with other checkpoint"):
        calibrate(copy, tokens=1024, sensitivities=True, save=tmp_path / "file")


def test_a_bad_source_leaves_nothing_to_go_on_with(source: Path, tmp_path: Path) -> None:
    error = NonFiniteWeightsError("layer 2 has NaN")
    assert interrupted(source, tmp_path / "file", 1, error, sensitivities=True) is error
    assert not getattr(error, "__notes__", [])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_layers_that_were_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes() -> Iterator[bool]:
        yield True
        while True:
            yield False

    fine, real = writes(), module.put_in_place

    def put(partial: Path, place: Path) -> None:
        if not next(fine):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(partial, place)

    monkeypatch.setattr(module, "put_in_place", put)
    with pytest.raises(DiskSpaceError, match="disk is full"):
        calibrate(source, tokens=1024, sensitivities=True, save=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.journal"]


def test_progress_begins_before_anything_is_measured_and_ends_whole(source: Path) -> None:
    seen: list[CalibrationProgress] = []
    calibrate(source, tokens=1024, sensitivities=True, progress=seen.append)
    assert (seen[0].layer, seen[0].share, seen[-1].layer, seen[-1].share) == (0, 0.0, 2, 1.0)
    assert seen[0].seconds_left > 0 == seen[-1].seconds_left
    shares = [at.share for at in seen]
    assert shares == sorted(shares)
    assert len(set(shares)) > 20
