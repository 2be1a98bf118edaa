"""What is remembered of earlier chats: whatever the file holds, and never more than a bounded one."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mlx_mixtral.cli.chat.history import MAX_FILE_BYTES, MAX_MESSAGE_CHARACTERS, FileHistory, history_path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history"


def test_messages_come_back_newest_first_whatever_their_lines_are(place: Path) -> None:
    messages = ["one", "two\nlines\n", 'quotes " \\ é 東京 \x1b', "/set seed 1"]
    history = FileHistory(place)
    for message in messages:
        history.append_string(message)
    assert list(FileHistory(place).load_history_strings()) == messages[::-1]
    assert [json.loads(line) for line in place.read_text().splitlines()] == messages


def test_two_chats_add_to_one_file(place: Path) -> None:
    one, other = FileHistory(place), FileHistory(place)
    one.append_string("a")
    other.append_string("b")
    one.append_string("c")
    assert list(FileHistory(place).load_history_strings()) == ["c", "b", "a"]


def test_a_file_that_others_could_read_is_made_private(place: Path) -> None:
    place.parent.mkdir()
    place.write_text('"old"\n')
    place.chmod(0o644)
    FileHistory(place).append_string("new")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert list(FileHistory(place).load_history_strings()) == ["new", "old"]


def test_damaged_lines_are_passed_over(place: Path) -> None:
    place.parent.mkdir()
    place.write_bytes(b'"a"\n\xff\n{"b": 1}\n[[[[\n"\\ud800"\n' + b"[" * 10**5 + b'\n"c"\n"torn')
    assert list(FileHistory(place).load_history_strings()) == ["c", "a"]


def test_a_long_file_is_cut_to_its_newest_messages_and_stays_private(place: Path) -> None:
    place.parent.mkdir()
    lines = [json.dumps(f"{number} {'x' * 1000}") for number in range(1200)]
    place.write_text("\n".join(lines) + "\n")
    kept = list(FileHistory(place).load_history_strings())
    assert place.stat().st_size <= MAX_FILE_BYTES // 2
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert kept == [json.loads(line) for line in lines[: -len(kept) - 1 : -1]]
    assert len(kept) > 400
    assert [path.name for path in place.parent.iterdir()] == ["history"]


def test_a_book_is_not_remembered(place: Path) -> None:
    history = FileHistory(place)
    history.append_string("x" * (MAX_MESSAGE_CHARACTERS + 1))
    assert not place.exists()
    assert len(history.get_strings()) == 1


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = FileHistory(tmp_path / "file" / "history")
    assert history.new_problem() == ""
    history.append_string("a")
    assert "cannot be written" in history.new_problem()
    history.append_string("b")
    assert history.new_problem() == ""
    assert history.get_strings() == ["a", "b"]


def test_the_place_is_the_users_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    usual = tmp_path / ".local" / "state" / "mlx-mixtral" / "chat-history"
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert history_path() == Path("/elsewhere/mlx-mixtral/chat-history")
