"""Files and folders written whole or not at all, and refused before the work that fills them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from mlx_mixtral import files
from mlx_mixtral.errors import DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.files import (
    Journal,
    atomic_write,
    check_destination,
    check_folder,
    open_partial,
    replace_file,
    write_folder,
)
from mlx_mixtral.leftovers import scratch_folder

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
    with pytest.raises(DestinationError, match=r"holds thesis\.tex, which this program did not write"):
        check(tmp_path / "made", overwrite=True)
    with pytest.raises(DestinationError, match="is a file"):
        check(tmp_path / "made" / "page.md", overwrite=True)
    with pytest.raises(DestinationError, match="create it first"):
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


def _node(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_ino, status.st_rdev


@pytest.mark.parametrize("device", [name for name in ("/dev/null", "/dev/full") if Path(name).exists()])
@pytest.mark.usefixtures("guarded_devices")
def test_a_device_is_written_to_and_stays(tmp_path: Path, device: str) -> None:
    """The link is what a container's root would lose; a full device says so."""
    before = _node(Path(device))
    (tmp_path / "link").symlink_to(device)
    for path in (Path(device), tmp_path / "link"):
        assert check_destination("--output", path) == Path(device)
        if device == "/dev/full":
            with pytest.raises(DiskSpaceError, match="the disk is full"):
                replace_file(path, b"data")
        else:
            replace_file(path, b"data")
        with pytest.raises(DestinationError, match="is a device, not a file"):
            check_destination("--resume", path, regular=True)
    assert _node(Path(device)) == before
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    replace_file(tmp_path / "pipe", b"data" * 100_000)
    reader.join(30)
    assert got == [b"data" * 100_000]
    assert (tmp_path / "pipe").is_fifo()


def test_the_name_of_an_open_file_is_that_file(tmp_path: Path) -> None:
    """As with ``--output /dev/stdout > file``: what comes before and after goes into the same file."""
    program = (
        "import sys; from pathlib import Path; from mlx_mixtral.files import check_destination, replace_file\n"
        "print('before', flush=True)\n"
        "replace_file(check_destination('--output', sys.argv[1]), b'data\\n')\n"
        "print('after')"
    )
    (tmp_path / "link").symlink_to("/dev/stdout")
    for name in ("/dev/stdout", "/dev/fd/1", str(tmp_path / "link")):
        with (tmp_path / "file").open("wb") as file:
            subprocess.run([sys.executable, "-c", program, name], stdout=file, check=True)
        assert (tmp_path / "file").read_bytes() == b"before\ndata\nafter\n"
        piped = subprocess.run([sys.executable, "-c", program, name], stdout=subprocess.PIPE, check=True)
        assert piped.stdout == b"before\ndata\nafter\n"


def test_what_is_no_file_is_refused_before_and_when_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    made = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(tmp_path):  # names of sockets are short
        made.bind("socket")
    made.close()
    listed = sorted(path.name for path in tmp_path.iterdir())
    for name, said in (
        ("folder", "is a folder"), ("to-folder", "is a folder"), ("socket", "is a socket"), ("loop", "symbolic links"),
    ):  # fmt: skip
        for write in (lambda path: check_destination("--output", path), lambda path: replace_file(path, b"data")):
            with pytest.raises(DestinationError, match=said):
                write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == listed


def test_a_link_to_nothing_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    assert check_destination("--output", tmp_path / "link") == tmp_path / "far" / "file"
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "far") == {"file": b"new"}
    (tmp_path / "astray").symlink_to("no/file")
    with pytest.raises(DestinationError, match=r"there is no folder .*/no; create it first"):
        check_destination("--output", tmp_path / "astray")


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"years of work")
    (tmp_path / "partial").symlink_to("precious")
    with open_partial(tmp_path / "partial") as file:
        file.write(b"data")
    assert (tmp_path / "precious").read_bytes() == b"years of work"
    assert (tmp_path / "partial").read_bytes() == b"data"


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path: Path) -> None:
    """Of the same file or folder only, and not while the other process lives or holds its lock."""
    program = (
        "import os, sys; from pathlib import Path; from mlx_mixtral.files import atomic_write, write_folder\n"
        "place = Path(sys.argv[1])\n"
        "def stop(*_):\n  print('at work', flush=True); sys.stdin.read()\n"
        "if place.suffix:\n  with atomic_write(place) as file:\n    file.write(b'half'); stop()\n"
        "else:\n  import mlx_mixtral.files as files; files.swap_folder = stop; write_folder(place, {'a': b'half'})\n"
    )
    for name in ("file.json", "folder"):
        place = tmp_path / name
        held = subprocess.Popen(
            [sys.executable, "-c", program, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert held.stdout is not None
        assert held.stdout.readline() == b"at work\n"
        left = list(tmp_path.glob(".*.partial"))
        assert len(left) == 1

        def write(place: Path = place) -> None:
            replace_file(place, b"data") if place.suffix else write_folder(place, {"a": b"data"})

        write()
        assert left[0].exists()
        held.kill()
        held.communicate()
        replace_file(tmp_path / "other.json", b"data")
        assert left[0].exists()
        write()
        assert not list(tmp_path.glob(".*"))
    assert contents(tmp_path) == {"file.json": b"data", "folder/a": b"data", "other.json": b"data"}


def test_scratch_of_a_killed_run_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (
        f"mlx-mixtral-report-{gone.pid}-abc",
        f"mlx-mixtral-report-{os.getpid()}-abc",
        "mlx-mixtral-report-abc",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reference").write_bytes(b"half")
    with scratch_folder("report") as folder:
        assert folder.parent == tmp_path
        left = {path.name for path in tmp_path.iterdir()} - {folder.name}
        assert left == {f"mlx-mixtral-report-{os.getpid()}-abc", "mlx-mixtral-report-abc"}
    assert not folder.exists()
