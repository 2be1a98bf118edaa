"""A conversion with adapters as a run: what it records, resumes, keeps with --exact, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import AdapterSource
from mlx_mixtral.errors import CheckpointError, ConversionError, DestinationError, InvalidRequestError, MixtralError
from mlx_mixtral_convert import Progress, Recipe, convert
from mlx_mixtral_convert.calibration.file import identity
from mlx_mixtral_convert.sources import open_source
from tests.convert.adapted_sources import FLOATS, SOURCES, base_of, gguf_source, place
from tests.convert.adapter_writer import (
    ATTENTION,
    EVERYTHING,
    EXPERTS,
    fused_by_hand,
    write_mlx_adapter,
)
from tests.convert.hub_server import run_all, serve
from tests.convert.support import CONFIG, hashes, make_checkpoint, measured, read_output
from tests.forks import run_python
from tests.processes import PYTHONPATH


def test_what_was_fused_is_recorded(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, ATTENTION)
    report = convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora", scale=0.5)])
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    (fused,) = report.adapters
    wanted = {"name": "lora", "kind": "mlx-lm", "scale": 0.5, "fingerprint": fused.fingerprint}
    assert manifest["adapters"] == [wanted]
    assert report.to_dict()["adapters"] == [wanted | {"matrices": 8, "rank": 4}]
    convert(source, tmp_path / "plain")
    assert "adapters" not in json.loads((tmp_path / "plain" / "conversion.json").read_text())


def stop_at(step: int) -> Callable[[Progress], None]:
    seen = iter(range(1, 10**9))

    def progress(_: Progress) -> None:
        if next(seen) == step:
            raise KeyboardInterrupt

    return progress


def interrupted(tmp_path: Path) -> tuple[Path, list[AdapterSource]]:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    given = [AdapterSource(tmp_path / "lora")]
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", adapters=given, progress=stop_at(17 + 5))
    return source, given


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source, given = interrupted(tmp_path)
    assert convert(source, tmp_path / "out", adapters=given).resumed_layers == 1
    convert(source, tmp_path / "whole", adapters=given)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


KILLED = """
import os, signal, sys
from mlx_mixtral import AdapterSource, load
from mlx_mixtral_convert import convert

steps = iter(range(1, 10**9))

def progress(_):
    if next(steps) == 17 + 5:
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], sys.argv[2], adapters=[AdapterSource(sys.argv[3])], progress=progress)
"""


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    arguments = [str(source), str(tmp_path / "out"), str(tmp_path / "lora")]
    done = run_python(KILLED, arguments, {**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == -signal.SIGKILL, done.stderr
    given = [AdapterSource(tmp_path / "lora")]
    assert convert(source, tmp_path / "out", adapters=given).resumed_layers == 1
    convert(source, tmp_path / "whole", adapters=given)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_streamed_source_gives_the_bytes_of_a_downloaded_one(tmp_path: Path) -> None:
    """GGUF, whose rows are put in order as they come."""
    gguf_source(tmp_path / "repository")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    adapters = [str(tmp_path / "lora")]
    with serve(tmp_path / "repository") as hub:
        hub.failures = 0.1
        results = run_all(
            tmp_path / "home",
            hub,
            [
                {"dest": tmp_path / name, "stream": name == "streamed", "adapters": adapters}
                for name in ("streamed", "stored")
            ],
        )
    assert not [result for result in results if "error" in result], results
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "stored")
    assert json.loads((tmp_path / "streamed" / "conversion.json").read_text())["adapters"][0]["name"] == "lora"


def test_it_does_not_go_on_with_other_adapters(tmp_path: Path) -> None:
    source, given = interrupted(tmp_path)
    write_mlx_adapter(tmp_path / "other", CONFIG, EVERYTHING, seed=5)
    for other, words in (
        ([], "adapters.1.name lora, but this one has absent"),
        ([AdapterSource(tmp_path / "lora", scale=0.5)], "adapters.1.scale 1.0, but this one has 0.5"),
        ([*given, *given], "adapters.2.name absent, but this one has lora"),
        ([AdapterSource(tmp_path / "other")], "adapters.1.name lora, but this one has other"),
    ):
        with pytest.raises(DestinationError) as caught:
            convert(source, tmp_path / "out", adapters=other)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "lora")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING, seed=6)
    with pytest.raises(DestinationError, match=r"adapters\.1\.fingerprint [0-9a-f]{64}, but this one has [0-9a-f]{64}"):
        convert(source, tmp_path / "out", adapters=given)
    assert convert(source, tmp_path / "out", adapters=given, restart=True).resumed_layers == 0


def test_an_adapter_that_changes_meanwhile_ends_the_conversion(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, ATTENTION)

    def touch(at: Progress) -> None:
        if at.layer == 1:
            (tmp_path / "lora" / "adapter_config.json").write_text("{}")

    with pytest.raises(ConversionError, match=r"adapter_config\.json changed during the conversion"):
        convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")], progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gguf, packed", "mlx"])
def test_exact_keeps_the_bytes_of_what_no_adapter_touches(tmp_path: Path, kind: str) -> None:
    SOURCES[kind](tmp_path / "source")
    source = place(tmp_path / "source")
    changes = write_mlx_adapter(tmp_path / "lora", CONFIG, ("self_attn.q_proj", EXPERTS[2]))
    plain = convert(source, tmp_path / "plain", exact=True)
    report = convert(source, tmp_path / "out", exact=True, adapters=[AdapterSource(tmp_path / "lora")])
    before, after = read_output(tmp_path / "plain"), read_output(tmp_path / "out")
    assert sorted(before) == sorted(after)
    touched = {path for path, _ in changes}
    wanted = fused_by_hand(base_of(source, tmp_path / "base"), changes)
    for name, value in after.items():
        path, _, kind_of = name.rpartition(".")
        if path not in touched:
            assert mx.array_equal(value, before[name]), name
        elif kind_of == "weight":
            spec = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
            scales, biases = (after[f"{path}.{field}"] for field in ("scales", "biases"))
            decoded = np.array(mx.dequantize(value, scales, biases, spec["group_size"], spec["bits"]), np.float32)
            error = np.linalg.norm(decoded - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < 0.15, name
    how = {entry.how: entry.matrices for entry in report.packings}
    assert how["requantised"] == len(touched)
    assert sum(how.values()) == sum(entry.matrices for entry in plain.packings)


def test_exact_with_nothing_left_to_keep_is_refused(tmp_path: Path) -> None:
    """Only experts are packed here, and the adapter changes them all."""
    make_checkpoint(tmp_path / "floats")
    packed = {f"*.{name.rpartition('.')[2]}": {"bits": 4} for name in EXPERTS}
    convert(tmp_path / "floats", tmp_path / "source", recipe=Recipe(None, overrides=packed))
    write_mlx_adapter(tmp_path / "lora", CONFIG, EXPERTS)
    with pytest.raises(InvalidRequestError, match="the adapters change all 6 of them; give bits instead"):
        convert(tmp_path / "source", tmp_path / "out", exact=True, adapters=[AdapterSource(tmp_path / "lora")])
    with pytest.raises(InvalidRequestError, match="this source has none"):
        convert(tmp_path / "floats", tmp_path / "out", exact=True, adapters=[AdapterSource(tmp_path / "lora")])


def test_gptq_sees_the_inputs_of_the_changed_model_and_a_note_says_what_it_does_not_see(tmp_path: Path) -> None:
    """As a conversion of the fused floats would, with the same calibration."""
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1)
    write_mlx_adapter(tmp_path / "lora", CONFIG | {"num_hidden_layers": 1}, EVERYTHING)
    given, stats = [AdapterSource(tmp_path / "lora")], measured(source)
    gptq_3 = Recipe(3, rounding="gptq")
    report = convert(source, tmp_path / "out", recipe=gptq_3, calibration=stats, adapters=given)
    assert any("the calibration is of the model without its adapters" in note for note in report.notes)
    convert(source, tmp_path / "floats", adapters=given, **FLOATS)
    with open_source(tmp_path / "floats") as opened:
        renamed_stats = replace(stats, identity=identity(opened))
    report = convert(tmp_path / "floats", tmp_path / "wanted", recipe=gptq_3, calibration=renamed_stats)
    assert not any("calibration" in note for note in report.notes)
    found, wanted = read_output(tmp_path / "out"), read_output(tmp_path / "wanted")
    for name in wanted:
        assert mx.array_equal(found[name], wanted[name]), name


def test_a_dry_run_writes_nothing_and_names_the_adapter(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, ATTENTION)
    report = convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")], dry_run=True)
    assert [fused.name for fused in report.adapters] == ["lora"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "source"]


def damaged(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def not_a_number(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.save_safetensors(str(file), tensors | {name: value * float("nan") for name, value in list(tensors.items())[:1]})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged, "adapters.safetensors"),
        (not_a_number, "holds NaN or infinity"),
        (lambda folder: (folder / "adapters.safetensors").unlink(), "no adapters.safetensors"),
        (shutil.rmtree, "lora"),
    ],
)
def test_a_bad_adapter_is_one_line_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    damage(tmp_path / "lora")
    before = hashes(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
    assert hashes(source) == before


@pytest.mark.parametrize("adapters", ["lora", AdapterSource("lora"), ["lora"], None, [("lora", 1.0)]])
def test_adapters_are_a_list_of_their_sources(tmp_path: Path, adapters: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert(tmp_path, tmp_path / "out", adapters=adapters)
    assert "AdapterSource" in str(caught.value)
    assert isinstance(caught.value, MixtralError)
