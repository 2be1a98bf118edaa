"""A conversion that was cut short goes on where it was, and what comes out is the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral.errors import ConversionError, DestinationError, DiskSpaceError, NonFiniteWeightsError
from mlx_mixtral_convert import Progress, Recipe, convert
from mlx_mixtral_convert.output.journal import JOURNAL
from tests.convert.support import EXPERT, hashes, make_checkpoint

LAYERS = 4
STEPS = 5 + 3 * 4  # of one decoder layer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> dict[str, str]:
    """Hashes of an uninterrupted conversion; the folder is gone again."""
    convert(source, tmp_path / "whole")
    found = hashes(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    return found


def stop_at(step: int, error: BaseException) -> Callable[[Progress], None]:
    seen = 0

    def progress(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            raise error

    return progress


def interrupt(source: Path, dest: Path, layers: int, **options: Any) -> None:
    """Stop in the middle of layer ``layers``, so that as many are finished."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, progress=stop_at(layers * STEPS + 8, KeyboardInterrupt()), **options)


def shards(*numbers: int) -> list[str]:
    return [f"model-{number:05}-of-{LAYERS + 1:05}.safetensors" for number in numbers]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("callback"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("layers", [1, 3])
def test_an_interruption_keeps_finished_layers_and_the_same_call_goes_on(
    tmp_path: Path, source: Path, expected: dict[str, str], error: BaseException, layers: int
) -> None:
    with pytest.raises(type(error)) as caught:
        convert(source, tmp_path / "out", progress=stop_at(layers * STEPS + 8, error))
    assert caught.value.__notes__[-1] == f"repeat the command to continue from layer {layers + 1} of {LAYERS}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    assert sorted(hashes(tmp_path / ".out.partial")) == sorted([JOURNAL, *shards(*range(1, layers + 1))])
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").iterdir()}
    seen: list[Progress] = []
    report = convert(source, tmp_path / "out", progress=seen.append)
    assert report.resumed_layers == layers
    assert hashes(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {at.layer for at in seen} == {*range(layers, LAYERS), None}
    assert seen[-1].done_bytes == seen[-2].done_bytes == seen[0].total_bytes
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert all(kept[name] == before[name] for name in shards(*range(1, layers + 1)))


def test_several_interruptions_add_up(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    for _ in range(LAYERS):
        # One layer and a bit each time.
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", progress=stop_at(STEPS + 3, KeyboardInterrupt()))
    report = convert(source, tmp_path / "out")
    assert report.resumed_layers == LAYERS
    assert hashes(tmp_path / "out") == expected


def test_before_any_layer_is_finished_nothing_stays(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, tmp_path / "a" / "out", progress=stop_at(STEPS - 2, KeyboardInterrupt()))
    assert not hasattr(caught.value, "__notes__")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_cancelling_is_an_interruption(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    asked = iter(range(1000))
    with pytest.raises(ConversionError, match=r"^conversion cancelled\b"):
        convert(source, tmp_path / "out", cancelled=lambda: next(asked) > 2 * STEPS + 5)
    assert convert(source, tmp_path / "out").resumed_layers == 2
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": Recipe(3)}, "recipe.bits 4, but this one has 3"),
        ({"recipe": Recipe(4, 32)}, "recipe.group_size 64, but this one has 32"),
        ({"recipe": Recipe(mode="mxfp4")}, "this one has"),
        ({"recipe": Recipe(overrides={"lm_head": False})}, "recipe.overrides.lm_head"),
        ({"dtype": "float16"}, "dtype bfloat16, but this one has float16"),
    ],
)
def test_other_options_are_refused_with_both_values(
    tmp_path: Path, source: Path, options: dict[str, Any], words: str
) -> None:
    interrupt(source, tmp_path / "out", 2)
    before = hashes(tmp_path / ".out.partial")
    with pytest.raises(DestinationError, match=r"out has an unfinished conversion \(2 files done\)") as caught:
        convert(source, tmp_path / "out", **options)
    assert words in str(caught.value)
    assert "--restart" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hashes(tmp_path / ".out.partial") == before
    assert convert(source, tmp_path / "out", restart=True, **options).resumed_layers == 0
    convert(source, tmp_path / "fresh", **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_other_options_are_welcome_when_a_killed_run_finished_nothing(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", 1)
    journal = tmp_path / ".out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    assert convert(source, tmp_path / "out", recipe=Recipe(8)).resumed_layers == 0
    convert(source, tmp_path / "fresh", recipe=Recipe(8))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer", "name"])
def test_another_source_is_refused_with_both_values(tmp_path: Path, source: Path, change: str) -> None:
    interrupt(source, tmp_path / "out", 2)
    if change == "weights":
        make_checkpoint(source, num_hidden_layers=LAYERS, seed=1)
    elif change == "config":
        make_checkpoint(source, num_hidden_layers=LAYERS, rms_norm_eps=1e-6)
    elif change == "tokenizer":
        (source / "tokenizer.model").write_text("pieces")
    else:
        source = source.rename(tmp_path / "other")
    where = {
        "weights": r"source\.files\.model\.safetensors\.sha256 [0-9a-f]{64}, but this one has [0-9a-f]{64}",
        "config": r"files\.config\.json [0-9a-f]{64}, but this one has [0-9a-f]{64}",
        "tokenizer": r"files\.tokenizer\.model absent, but this one has [0-9a-f]{64}",
        "name": "source.name source, but this one has other",
    }[change]
    with pytest.raises(DestinationError, match=where):
        convert(source, tmp_path / "out")


def test_a_rounding_that_was_left_out_is_called_by_its_name(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    with pytest.raises(DestinationError, match=r"with recipe\.rounding plain, but this one has search;"):
        convert(source, tmp_path / "out", recipe=Recipe(rounding="search"))


def test_the_same_source_copied_again_is_the_same(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    interrupt(source, tmp_path / "out", 2)
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    (tmp_path / "copy").rename(source)
    assert convert(source, tmp_path / "out").resumed_layers == 2
    assert hashes(tmp_path / "out") == expected


def test_a_journal_is_believed_only_as_far_as_its_shards_prove_it(
    tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    interrupt(source, tmp_path / "out", 3)
    partial = tmp_path / ".out.partial"
    first, second, third = (partial / name for name in shards(1, 2, 3))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    second.write_bytes(second.read_bytes()[:-1])
    (partial / "stray").mkdir()
    assert third.is_file()
    assert convert(source, tmp_path / "out").resumed_layers == 1
    assert hashes(tmp_path / "out") == expected


def test_a_journal_torn_anywhere_loses_no_more_than_its_last_line(
    tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    interrupt(source, tmp_path / "out", 2)
    saved, journal = tmp_path / "saved", tmp_path / ".out.partial" / JOURNAL
    shutil.copytree(tmp_path / ".out.partial", saved)
    text = journal.read_bytes()
    lines = [end + 1 for end, byte in enumerate(text) if byte == ord("\n")]
    for cut in (0, 10, lines[0] - 1, lines[0], lines[0] + 1, lines[1] - 1, lines[1], lines[1] + 40, lines[2] - 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        shutil.copytree(saved, tmp_path / ".out.partial")
        journal.write_bytes(text[:cut])
        whole = sum(end <= cut for end in lines)
        assert convert(source, tmp_path / "out").resumed_layers == max(0, whole - 1), cut
        assert hashes(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(saved, tmp_path / ".out.partial")
    journal.write_bytes(text[:-20] + b"\xff" * 300)
    assert convert(source, tmp_path / "out").resumed_layers == 1


@pytest.mark.parametrize("line", [b'{"file": "../source/model.safetensors", "bytes": 1}', b"[]", b"3", b"{}"])
def test_a_line_that_means_nothing_is_no_finished_shard(tmp_path: Path, source: Path, line: bytes) -> None:
    interrupt(source, tmp_path / "out", 1)
    with (tmp_path / ".out.partial" / JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    before = hashes(source)
    assert convert(source, tmp_path / "out").resumed_layers == 1
    assert hashes(source) == before


@pytest.mark.parametrize("kind", ["nan", "changed"])
def test_a_bad_source_leaves_nothing_even_after_finished_layers(tmp_path: Path, kind: str) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[EXPERT].flat[5] = np.nan if kind == "nan" else 0

    source = make_checkpoint(tmp_path / "source", edit=edit)

    def touch(at: Progress) -> None:
        if kind == "changed" and at.layer == 1:
            os.utime(source / "model.safetensors", ns=(1, 1))

    error, words = (NonFiniteWeightsError, EXPERT) if kind == "nan" else (ConversionError, "it was modified")
    with pytest.raises(error, match=words):
        convert(source, tmp_path / "out", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_went_away_is_an_interruption(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    weights, away = source / "model.safetensors", tmp_path / "away"

    def unplug(at: Progress) -> None:
        if at.layer == 2 and weights.exists():
            weights.rename(away)

    with pytest.raises(ConversionError, match="can no longer be read"):
        convert(source, tmp_path / "out", progress=unplug)
    away.rename(weights)
    assert convert(source, tmp_path / "out").resumed_layers == 2
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "append"])
def test_a_disk_that_fills_up_anywhere_is_one_line_and_resumable(
    tmp_path: Path, source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every few calls later than before, until one conversion gets through."""
    failures = kept = 0
    for allowed in range(0, 2000, {"pwrite": 37, "fsync": 2, "replace": 1, "append": 1}[call]):
        with monkeypatch.context() as patch:
            _fill_disk(patch, call, allowed)
            try:
                report = convert(source, tmp_path / "out")
            except DiskSpaceError as full:
                error = str(full)
            else:
                break
        assert "the disk is full" in error
        assert "\n" not in error
        assert not (tmp_path / "out").exists()
        failures += 1
        kept = max(kept, (tmp_path / ".out.partial").is_dir())
    assert hashes(tmp_path / "out") == expected
    assert report.resumed_layers > 0
    assert failures >= 2
    assert kept


def _fill_disk(patch: pytest.MonkeyPatch, call: str, allowed: int) -> None:
    owner, name = {"append": (Path, "open"), "replace": (Path, "replace")}.get(call, (os, call))
    genuine, done = getattr(owner, name), 0

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += call != "append" or "ab" in arguments
        if done > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*arguments, **options)

    patch.setattr(owner, name, full)


def test_a_disk_that_is_full_for_a_moment_fails_the_conversion_wherever_that_is(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write fails and the next succeed: no shard with a hole is taken for finished."""
    pwrite, calls, failing = os.pwrite, 0, 0

    def once(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", once)
    convert(source, tmp_path / "whole")
    writes_per_layer = calls // (LAYERS + 1)
    assert writes_per_layer > 30
    for number in range(writes_per_layer - 8, writes_per_layer + 8):
        calls, failing = 0, number
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            convert(source, tmp_path / "out", restart=True)


def test_room_is_asked_only_for_what_is_left(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, tmp_path / "out", 3)
    needed = convert(source, tmp_path / "out", dry_run=True).disk_needed_bytes
    done = sum((tmp_path / ".out.partial" / name).stat().st_size for name in shards(1, 2, 3))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - done - 1))
    with pytest.raises(DiskSpaceError, match="free some space"):
        convert(source, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - done))
    assert convert(source, tmp_path / "out").resumed_layers == 3


def test_an_interrupted_overwrite_goes_on_and_keeps_the_old_folder_until_then(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out", recipe=Recipe(8))
    old = hashes(tmp_path / "out")
    interrupt(source, tmp_path / "out", 2, overwrite=True)
    assert hashes(tmp_path / "out") == old
    assert convert(source, tmp_path / "out", overwrite=True).resumed_layers == 2
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]["bits"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_dry_run_touches_no_unfinished_conversion(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    before = hashes(tmp_path / ".out.partial")
    convert(source, tmp_path / "out", dry_run=True, restart=True)
    assert hashes(tmp_path / ".out.partial") == before
