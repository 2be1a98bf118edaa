"""The destination appears complete or not at all, and nothing that is not ours is ever replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.errors import ConversionError, DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral_convert import Progress, Recipe, convert
from mlx_mixtral_convert.export import export
from tests.convert.support import hashes, make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupt_at(step: int, error: BaseException) -> Callable[[Progress], None]:
    seen = 0

    def progress(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            raise error

    return progress


@pytest.mark.parametrize("step", [1, 2, 17])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("callback"), SystemExit(3)])
def test_a_run_interrupted_in_its_first_layer_leaves_nothing_behind(
    tmp_path: Path, source: Path, step: int, error: BaseException
) -> None:
    before = hashes(source)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "a" / "b" / "out", progress=interrupt_at(step, error))
    assert entries(tmp_path) == ["source"]
    assert hashes(source) == before


@pytest.mark.parametrize("step", [18, 36, 37])
def test_an_interrupted_run_leaves_only_finished_shards_and_their_journal(
    tmp_path: Path, source: Path, step: int
) -> None:
    before = hashes(source)
    convert(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a" / "out", progress=interrupt_at(step, KeyboardInterrupt()))
    assert entries(tmp_path / "a") == [".out.partial"]
    left, whole = hashes(tmp_path / "a" / ".out.partial"), hashes(tmp_path / "whole")
    del left["journal.jsonl"]
    assert len(left) == {18: 1, 36: 2, 37: 3}[step]
    assert left.items() <= whole.items()
    assert hashes(source) == before


def test_cancelling_ends_between_matrices(tmp_path: Path, source: Path) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    with pytest.raises(ConversionError, match=r"^conversion cancelled\b"):
        convert(source, tmp_path / "out", cancelled=cancelled)
    assert asked == 21
    assert entries(tmp_path) == [".out.partial", "source"]


def test_missing_parents_are_made_and_the_partial_folder_is_gone(tmp_path: Path, source: Path) -> None:
    seen: list[bool] = []
    out = tmp_path / "a" / "b" / "out"
    convert(source, out, progress=lambda _: seen.append(out.exists() or not out.with_name(".out.partial").is_dir()))
    assert not any(seen)
    assert entries(out.parent) == ["out"]


def test_an_empty_folder_is_used(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "conversion.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, source: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DestinationError, match=r"was not made by a conversion \(it holds thesis\.tex\)"):
        convert(source, tmp_path / "out", overwrite=overwrite)
    assert entries(tmp_path / "out") == ["thesis.tex"]


def test_a_finished_conversion_is_replaced_only_on_request_and_only_when_complete(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, recipe=Recipe(8))
    first = hashes(out)
    with pytest.raises(DestinationError, match=r"is already a finished conversion; replace it with --overwrite"):
        convert(source, out)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, overwrite=True, progress=interrupt_at(30, KeyboardInterrupt()))
    assert hashes(out) == first

    def unchanged(_: Progress) -> None:
        assert hashes(out) == first

    convert(source, out, overwrite=True, progress=unchanged)
    convert(source, tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")
    assert entries(tmp_path) == ["fresh", "out", "source"]


def test_overwriting_keeps_files_the_conversion_did_not_write(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(DestinationError, match=r"holds notes\.md, which that conversion did not write"):
        convert(source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.md").unlink()
    (tmp_path / "out" / "conversion.json").write_text("{")
    with pytest.raises(DestinationError, match="did not write"):
        convert(source, tmp_path / "out", overwrite=True)


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(source, out)
    first, rename = hashes(out), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DestinationError, match="cannot be written: Input/output error"):
        convert(source, out, recipe=Recipe(8), overwrite=True)
    assert hashes(out) == first
    assert entries(tmp_path) == [".out.partial", "out", "source"]
    monkeypatch.setattr(Path, "rename", rename)
    assert convert(source, out, recipe=Recipe(8), overwrite=True).resumed_layers == 2
    assert entries(tmp_path) == ["out", "source"]


def test_a_partial_folder_without_a_journal_is_cleared_away(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.partial" / "model-00001-of-00003.safetensors").write_bytes(b"half")
    convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["out", "source"]
    assert "folder" not in entries(tmp_path / "out")


def test_a_folder_a_killed_overwrite_put_aside_comes_back(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    first = hashes(out)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(DestinationError, match="has been restored"):
        convert(source, out)
    assert hashes(out) == first
    shutil.copytree(out, tmp_path / ".out.old")
    convert(source, out, overwrite=True)
    assert entries(tmp_path) == ["out", "source"]
    out.rename(tmp_path / ".out.old")
    convert(source, out, overwrite=True)
    assert hashes(out) == first
    assert entries(tmp_path) == ["out", "source"]


def test_a_run_killed_right_after_the_rename_is_finished(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    first = hashes(out)
    (out / "journal.jsonl").write_text("{}")
    with pytest.raises(DestinationError, match="is already a finished conversion"):
        convert(source, out)
    assert hashes(out) == first


def test_two_conversions_of_one_destination_do_not_mix(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00003.safetensors").write_bytes(b"in progress")
    holder = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(DestinationError, match="another conversion is writing"):
            convert(source, tmp_path / "out")
        assert entries(tmp_path / ".out.partial") == ["model-00001-of-00003.safetensors"]
    finally:
        os.close(holder)


@pytest.mark.parametrize(
    ("dest", "match"),
    [
        ("source", "is the source itself"),
        ("source/out", "lies inside the source"),
        (".", "contains the source"),
        ("file", "exists and is a file"),
        ("file/out", "file is a file, not a folder"),
        ("dangling", "exists and is a file|cannot be"),
    ],
)
def test_places_that_cannot_be_a_destination(tmp_path: Path, source: Path, dest: str, match: str) -> None:
    (tmp_path / "file").write_text("")
    before = hashes(source)
    if dest == "dangling":
        (tmp_path / "dangling").symlink_to(tmp_path / "file")
    with pytest.raises(DestinationError, match=match):
        convert(source, tmp_path / dest, overwrite=True)
    assert hashes(source) == before


def test_a_link_to_the_source_is_still_the_source(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(DestinationError, match="is the source itself"):
        convert(source, tmp_path / "link", overwrite=True)


def test_a_parent_that_cannot_be_written_is_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DestinationError, match=r"out cannot be written: Permission denied; give another destination"):
        convert(source, tmp_path / "out")


def test_too_little_room_is_found_before_writing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    with pytest.raises(DiskSpaceError, match=r"needs 1\.\d+ MB and .* has 1\.5 MB free"):
        convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["source"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writes", [0, 1, 30])
def test_a_disk_that_fills_up_in_the_first_layer_is_one_line_and_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, writes: int
) -> None:
    pwrite, done = os.pwrite, 0

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal done
        done += 1
        if done > writes:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        DiskSpaceError, match=r"the disk is full: model-0000\d-of-00003\.safetensors got .* of its"
    ) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == ["source"]


def test_a_disk_that_fills_up_at_the_last_small_file(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskSpaceError, match=r"config\.json"):
        convert(source, tmp_path / "out")
    assert entries(tmp_path) == [".out.partial", "source"]


def test_short_writes_are_continued(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "expected")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: 1 + len(data) // 2], offset))
    convert(source, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(DestinationError, match=r"out is a mount point.*; give a folder in it, such as .*out/model"):
        convert(source, out, overwrite=overwrite, progress=lambda _: pytest.fail("it ran"))
    assert convert(source, out / "model").layers == 2


@pytest.mark.parametrize("what", ["source", "destination"])
def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(source if what == "source" else tmp_path / "here")
    names = ("", str(tmp_path / "out")) if what == "source" else (str(source), "")
    with pytest.raises(
        InvalidRequestError, match=f"^the {what} (is|has) an empty name; write . for the current folder$"
    ):
        convert(*names)
    with pytest.raises(InvalidRequestError, match=f"^the {what} (is|has) an empty name"):
        export(*names, to="hf")
    assert entries(tmp_path) == ["here", "source"]
    assert entries(tmp_path / "here") == []
