"""Files and folders written whole or not at all, and refused before the work that fills them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mlx_mixtral import files
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.files import Journal, atomic_write, check_folder, write_folder

FILES = {"page.md": b"page", "plots/one.png": b"1", "plots/two.png": b"2"}


def contents(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_folder_holds_all_its_files_and_nothing_is_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "made", FILES)
    assert contents(tmp_path) == {f"made/{name}": data for name, data in FILES.items()}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_that_is_there_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "made", {"page.md": b"old", "plots/older.png": b"0"})
    write_folder(tmp_path / "made", FILES)
    assert contents(tmp_path) == {f"made/{name}": data for name, data in FILES.items()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 3])
def test_what_ends_it_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    write_folder(tmp_path / "made", {"page.md": b"old"})
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error

    monkeypatch.setattr(files.os, "fsync", fsync)
    wanted = KeyboardInterrupt
    if isinstance(error, OSError):
        wanted = DiskSpaceError if error.errno == errno.ENOSPC else DestinationError  # type: ignore[assignment]
    for name in ("made", "other"):
        calls = 0
        with pytest.raises(wanted):
            write_folder(tmp_path / name, FILES)
    assert contents(tmp_path) == {"made/page.md": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_interrupt_between_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "made", {"page.md": b"old"})
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "made", FILES)
    assert contents(tmp_path) == {"made/page.md": b"old"}


def test_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    def check(path: object, *, overwrite: bool = False) -> Path:
        return check_folder("--output", path, overwrite=overwrite, holds=("page.md", "plots"))  # type: ignore[arg-type]

    assert check(tmp_path / "new") == tmp_path / "new"
    write_folder(tmp_path / "made", FILES)
    with pytest.raises(DestinationError, match=r"made exists; .*--overwrite"):
        check(tmp_path / "made")
    assert check(tmp_path / "made", overwrite=True) == tmp_path / "made"
    (tmp_path / "link").symlink_to(tmp_path / "made")
    assert check(tmp_path / "link", overwrite=True) == tmp_path / "made"
    (tmp_path / "made" / "thesis.tex").write_text("years of work")
    with pytest.raises(DestinationError, match=r"holds thesis\.tex, which is not ours"):
        check(tmp_path / "made", overwrite=True)
    with pytest.raises(DestinationError, match="is a file"):
        check(tmp_path / "made" / "page.md", overwrite=True)
    with pytest.raises(DestinationError, match="make it first"):
        check(tmp_path / "no" / "folder")
    with pytest.raises(InvalidRequestError, match="empty name"):
        check("")


@pytest.mark.parametrize("name", ["file", "n" * 255, "é" * 127])
def test_a_file_appears_when_its_block_ends(tmp_path: Path, name: str) -> None:
    for data in (b"first", b"second"):
        with atomic_write(tmp_path / name) as file:
            file.write(data)
            assert (tmp_path / name).exists() == (data == b"second")
        assert contents(tmp_path) == {name: data}


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.ENOSPC, "full"), DiskSpaceError),
        (OSError(errno.EDQUOT, "full"), DiskSpaceError),
        (OSError(errno.EIO, "bad"), DestinationError),
        (ValueError("not the disk"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_block_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, error: BaseException, wanted: type[BaseException]
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(path: Path) -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    for name in ("file", "new"):
        with pytest.raises(wanted) as caught:
            fail(tmp_path / name)
        assert not isinstance(error, OSError) or (name in str(caught.value) and "partial" not in str(caught.value))
    assert contents(tmp_path) == {"file": b"old"}


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "far") == {"file": b"new"}


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(DestinationError, match=r"no/file cannot be written: No such file"),
        atomic_write(tmp_path / "no" / "file"),
    ):
        pytest.fail("there is nothing to write to")


def test_a_journal_is_read_back_up_to_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() is None
    journal.start({"model": "a"}, [{"part": 0}])
    journal.append({"part": 1}, {"part": 2})
    whole = journal.path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == [
        {"journal": 1, "identity": {"model": "a"}}, {"part": 0}, {"part": 1}, {"part": 2},
    ]  # fmt: skip
    starts = [0, *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole) + 1):
        journal.path.write_bytes(whole[:length])
        lines = sum(start <= length for start in starts[1:])
        found = journal.read()
        assert found == (None if not lines else ({"model": "a"}, [{"part": part} for part in range(lines - 1)]))
    journal.start({"model": "b"})
    assert journal.read() == ({"model": "b"}, [])


@pytest.mark.parametrize(
    "data", [b"", b"years of work", b"[]\n", b'{"journal": 2}\n', b'{"part": 1}\n', b"[" * 100_000]
)
def test_another_file_is_no_journal(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert Journal(tmp_path / "file").read() is None
