"""Addresses and short names of models, in every place that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_mixtral import load
from mlx_mixtral.cli.app import app
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MixtralError
from mlx_mixtral.hub import Source, resolve
from mlx_mixtral.model_names import hub_name, not_there, repository_name
from mlx_mixtral_convert import calibrate, convert
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.upload import upload

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("https://huggingface.co/owner/name", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name/", ("owner/name", None, None)),
        ("  http://www.huggingface.co/owner/name-v0.1?library=mlx#files ", ("owner/name-v0.1", None, None)),
        ("https://hf.co/owner/name", ("owner/name", None, None)),
        ("hf.co/owner/name", ("owner/name", None, None)),
        ("HuggingFace.co/owner/Name", ("owner/Name", None, None)),
        ("hf://owner/name", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name.git", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name/tree/main", ("owner/name", "main", None)),
        (f"https://huggingface.co/owner/name/tree/{COMMIT}/", ("owner/name", COMMIT, None)),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F4", ("owner/name", "refs/pr/4", None)),
        ("https://huggingface.co/owner/name/tree/refs/pr/4", ("owner/name", "refs/pr/4", None)),
        ("https://huggingface.co/owner/name/commits/main", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name/discussions/3", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name/blob/main/m.Q4_K_M.gguf", ("owner/name", "main", "m.Q4_K_M.gguf")),
        ("https://hf.co/owner/name/resolve/v1/m.gguf?download=true", ("owner/name", "v1", "m.gguf")),
        ("https://huggingface.co/owner/name/blob/main/config.json", ("owner/name", "main", None)),
    ],
)
def test_the_address_of_a_page_is_its_repository(address: str, parts: tuple[str, str | None, str | None]) -> None:
    found = Source.parse(address)
    assert (found.repository, found.revision, found.file) == parts
    assert found.path is None


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/", "https://huggingface.co/datasets/owner/name", "https://huggingface.co/spaces/owner/name",
        "https://example.com/owner/name", "https://huggingface.co.example.com/owner/name", "s3://bucket/model",
        "https://huggingface.co/owner", "https://huggingface.co/owner/..",
    ],
)  # fmt: skip
def test_an_address_of_something_else_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"address.*write .*https://huggingface.co/owner/name"):
        Source.parse(address)


def test_text_that_is_no_address_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("owner/name@v1:m.gguf", "./hf.co", "huggingface.co", "a b", "8x7b"):
        assert hub_name(text) == text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf.co" / "owner" / "name").mkdir(parents=True)
    assert Source.parse("hf.co/owner/name").path == Path("hf.co/owner/name")


def test_an_address_and_an_argument_name_one_revision() -> None:
    assert Source.parse("https://hf.co/owner/name/tree/v1", "v1").revision == "v1"
    with pytest.raises(InvalidRequestError, match="names revision 'v1', the argument 'v2'"):
        Source.parse("https://hf.co/owner/name/tree/v1", "v2")


def test_a_repository_to_write_to_has_an_address_too(tmp_path: Path) -> None:
    assert repository_name("https://hf.co/owner/name/tree/main") == "owner/name"
    with pytest.raises(CheckpointError, match="absent"):
        upload(tmp_path / "absent", "https://huggingface.co/owner/name", dry_run=True)
    with pytest.raises(InvalidRequestError, match="is not a hub repository; write owner/name, with no revision"):
        upload(tmp_path / "absent", "https://huggingface.co/owner/name/tree/v1", dry_run=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mixtral-8x7B-v0.1", "owner/name, such as mistralai/Mixtral-8x7B-v0.1"),
        ("mixtral-8x7b-instruct-v0.1", "such as mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("Mixtral-8x7B-Instruct-v0.1-4bit", "such as mlx-community/Mixtral-8x7B-Instruct-v0.1-4bit"),
        ("Mixtral-8x22B-Instruct-v01", "such as mistralai/Mixtral-8x22B-Instruct-v0.1"),
        ("absent", "such as mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("8x7b", "mlx-community/Mixtral-8x7B-Instruct-v0.1-4bit runs as it is"),
        ("8X7B", "mlx-mixtral convert mistralai/Mixtral-8x7B-Instruct-v0.1 DEST"),
        ("mixtral:8x22b", "mlx-mixtral convert mistralai/Mixtral-8x22B-Instruct-v0.1 DEST"),
    ],
)
def test_a_name_without_its_owner_is_answered_with_one_that_works(name: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: no such folder")
    assert words in said
    for word in said.replace(":", " ").split():
        if word.count("/") == 1 and word != "owner/name":
            assert Source.parse(word.rstrip(",;")).repository is not None


def test_a_path_is_not_taken_for_a_slip_of_a_repository() -> None:
    for path in ("./absent", "a/b/c", "/absent/x", "~/absent"):
        assert not_there(path) == f"{path}: no such folder"


@pytest.mark.parametrize("command", ["chat", "bench", "routing --text x", "verify", "convert", "calibrate"])
def test_every_command_says_so(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = command.split()
    (tmp_path / "x").write_text("x")
    to = ["out"] if name in ("convert", "calibrate") else []
    result = CliRunner().invoke(app, [name, "8x7b", *to, *rest])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "owner/name" in result.stderr or name == "verify"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    "call",
    [load, lambda name: convert(name, "out"), lambda name: export(name, "out", to="hf"), calibrate],
    ids=["load", "convert", "export", "calibrate"],
)
def test_every_function_takes_an_address(call: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None, *_: object) -> Path:
        asked.append((repository, revision))
        raise MixtralError("asked")

    monkeypatch.setitem(Source.resolve.__globals__, "download", download)
    with pytest.raises(MixtralError, match="asked"):
        call("https://huggingface.co/owner/name/tree/v2")  # type: ignore[operator]
    assert asked == [("owner/name", "v2")]
