"""One reader of files that come from strangers: what is no file, too large, or no JSON that means one thing, is an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from types import FrameType

import pytest

from mlx_mixtral import load
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.errors import CheckpointError, DestinationError, InvalidRequestError, MixtralError, TokenizerError
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.evaluation.reference import Reference
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.reading import (
    MAX_CONFIG_BYTES,
    MAX_GIVEN_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    is_there,
    parse_json,
    read_file,
    read_given,
    read_json,
)
from mlx_mixtral.runtime.saved_prompt import check_saved
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.calibration.file import Calibration

LIMIT_S = 30


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Opening a pipe that nobody writes to would wait for ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits for something")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _socket(path: Path) -> None:
    made = socket.socket(socket.AF_UNIX)
    with chdir(path.parent):  # names of sockets are short
        made.bind(path.name)
    made.close()


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 20 * 2**30)


# What may lie in the place of a file, and what is said of it.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "it is a folder, not a file"),
    "pipe": (os.mkfifo, "it is a pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "socket": (_socket, "it is a socket, not a file"),
    "dangling": (lambda path: path.symlink_to("gone"), "it is a link to gone, which does not exist"),
    "cyclic": (lambda path: path.symlink_to(path.name), "it is a link that points back to itself"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def put(path: Path, kind: str) -> str:
    """Put something of a kind in the place of a file, and give what is to be said of it."""
    path.unlink(missing_ok=True)
    make, said = KINDS[kind]
    make(path)
    return said


@each_kind
def test_what_is_no_file_is_there_and_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    assert not is_there(path)
    said = put(path, kind)
    assert is_there(path)
    for error in (CheckpointError, TokenizerError):
        with pytest.raises(error, match=f"file cannot be read: {said}"):
            read_file(path, 100, error)


def test_names_that_no_file_can_have_are_absent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("x" * 5000, "a\0b", "file/below"):
        assert not is_there(tmp_path / name)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_file(tmp_path / name, 100)


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 4) == b"data"
    with pytest.raises(CheckpointError, match="link has 4 bytes; no file of its kind has more than 3"):
        read_file(tmp_path / "link", 3)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    _sparse(tmp_path / "file")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"more than {MAX_CONFIG_BYTES}"):
            read_json(tmp_path / "file")
        with pytest.raises(InvalidRequestError, match=f"more than {MAX_GIVEN_BYTES}"):
            read_given(tmp_path / "file", InvalidRequestError)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_text_may_come_through_a_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"some text")
    os.close(writing)
    assert read_given(Path(f"/dev/fd/{reading}"), InvalidRequestError) == b"some text"
    os.close(reading)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ('{"x": [{"b": 1, "c": 2, "b": 3}]}', "the key 'b' occurs twice"),
        ('{"\\u0061": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": ["\\ud83d\\ude00", "x\\uD800"]}', "a string holds a lone surrogate U.D800"),
        ('{"\\udfff": 1}', "a string holds a lone surrogate U.DFFF"),
        ('{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}", "nested more than 100 levels"),
        ('{"a": ' * 150 + "1" + "}" * 150, "nested more than 100 levels"),
        ('{"a": [' + "[]," * MAX_JSON_VALUES + "1]}", "holds more than 4000000 values"),
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", "nested more than 100 levels|is not valid JSON"),
    ],
)
def test_json_that_means_two_things_or_too_many_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"^it {said}|^it is not valid JSON: {said}|^it is {said}"):
        parse_json("it", text.encode())


def test_other_json_is_what_the_json_module_reads() -> None:
    text = '{"a": ' + "[" * (MAX_JSON_DEPTH - 2) + "1.5" + "]" * (MAX_JSON_DEPTH - 2) + ', "b": {"a": [{"c": "é"}]}}'
    assert parse_json("it", text) == json.loads(text)


@pytest.fixture
def folder(short: Path, tmp_path: Path) -> Path:
    """A checkpoint with every companion file there is."""
    place = Path(shutil.copytree(short, tmp_path / "model"))
    for name in ("added_tokens.json", "special_tokens_map.json", "chat_template.json"):
        (place / name).write_text("{}")
    (place / "LICENSE").write_text("Do what you want.")
    return place


READ = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "conversion.json")
TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
COPIED = ("special_tokens_map.json", "LICENSE", "LICENSE.txt", "tokenizer.model.v9")


@pytest.mark.parametrize("name", [*READ, *TOKENIZER, *COPIED])
@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_no_companion_of_a_checkpoint_hangs_or_counts_as_absent(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "sparse":
        (folder / name).unlink(missing_ok=True)
        _sparse(folder / name)
        said = "no file of its kind has more|starts with 8 bytes|bytes at the end belong to no tensor|is not valid JSON"
    else:
        said = put(folder / name, kind)
    if name in READ:
        with pytest.raises(MixtralError, match=said):
            load(folder)
    elif name in TOKENIZER:
        with pytest.raises(TokenizerError, match=said):
            load_tokenizer(folder)
    # Conversions read no manifest.
    if name != "conversion.json":
        before = sorted(tmp_path.iterdir())
        with pytest.raises(MixtralError, match=said):
            convert(folder, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before


OWN: dict[str, Callable[[Path], object]] = {
    "calibration": Calibration.load,
    "trace": RoutingTrace.load,
    "record": RoutingRecord.load,
    "reference": Reference,
    "saved prompt": check_saved,
    "conversation": lambda path: Conversation().load(path),
    "recipe": Recipe.from_file,
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_no_file_of_ours_hangs_either(tmp_path: Path, own: str, kind: str) -> None:
    if kind == "sparse":
        _sparse(tmp_path / "file")
        said = "no file of its kind has more|is not a saved prompt"
    else:
        said = put(tmp_path / "file", kind)
    with pytest.raises(MixtralError, match=said):
        OWN[own](tmp_path / "file")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "cyclic"])
def test_a_journal_is_a_file(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "file", kind)
    with pytest.raises(DestinationError):
        EvaluationJournal(tmp_path / "file", {})


def test_a_routing_trace_beside_the_weights_is_read_or_refused(folder: Path) -> None:
    os.mkfifo(folder / "routing.trace")
    with pytest.raises(CheckpointError, match=r"routing\.trace cannot be read: it is a pipe"):
        load(folder, memory="16MB", context=64)


def test_a_file_without_permission_is_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refuse)
        assert is_there(tmp_path / "config.json")
