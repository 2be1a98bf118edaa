"""``list``, ``pull`` and ``rm`` on a cache in the layout of the hub's client, which is the oracle of what is left."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mlx_mixtral.cli.models.names import cached_models, hub_cache
from mlx_mixtral.hub import Source
from mlx_mixtral_convert.export import export
from tests.processes import PYTHONPATH

from .conftest import Invoke, assert_one_error

COMMITS = ("1" * 40, "2" * 40)


class Cache:
    """A cache of the hub's client, filled by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self, name: str, files: dict[str, bytes], commit: str = COMMITS[0], refs: tuple[str, ...] = ("main",)
    ) -> Path:
        """A revision; blobs of the same content are one file, as in the client's."""
        place = self.root / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        for folder in (place / "blobs", place / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            blob = place / "blobs" / f"{hash(data) & (2**64 - 1):016x}{len(data)}"
            blob.write_bytes(data)
            (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
        for ref in refs:
            (place / "refs" / ref).write_text(commit)
        return snapshot


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of repositories by what is to be said of them."""
    model = {path.name: path.read_bytes() for path in tiny.iterdir() if path.is_file()}
    gguf = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export(tiny, gguf, to="gguf")
    small = {name: data for name, data in model.items() if not name.endswith(".safetensors")}
    cut = {name: data[:5000] if name.endswith(".safetensors") else data for name, data in model.items()}
    bert = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 100}
    return {
        "runs": model,
        "convert first": {"m.gguf": gguf.read_bytes()},
        "no weights": small,
        "cannot be read": cut,
        "not a Mixtral": bert,
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    root = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    root.mkdir()
    yield Cache(root)
    shutil.rmtree(root, ignore_errors=True)


def test_the_list_says_what_can_be_done_with_each(
    invoke: Invoke, cache: Cache, files: dict[str, dict[str, bytes]]
) -> None:
    for state, content in files.items():
        cache.add(f"owner/{state.replace(' ', '-')}", content)
    found = json.loads(invoke("list", "--json").stdout)
    assert {item["model"]: item["state"] for item in found["models"]} == {
        f"owner/{state.replace(' ', '-')}": state for state in files
    }
    client = {repo.repo_id: repo.size_on_disk for repo in huggingface_hub.scan_cache_dir(cache.root).repos}
    assert {item["model"]: item["bytes"] for item in found["models"]} == client
    assert found["bytes"] == sum(client.values())
    shown = invoke("list").stdout
    for state in files:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"owner/{state.replace(' ', '-')} ")]
        assert state in line
    assert shown.startswith(f"{len(files)} models, ")


def test_of_several_revisions_the_main_one_is_what_is_told(invoke: Invoke, cache: Cache, files: dict[str, Any]) -> None:
    """It is the one that a name without a revision means."""
    for name, commit in (("owner/first", COMMITS[0]), ("owner/second", COMMITS[1])):
        other = COMMITS[0] if commit == COMMITS[1] else COMMITS[1]
        cache.add(name, files["runs"], commit)
        cache.add(name, files["no weights"], other, ())
    found = json.loads(invoke("list", "--json").stdout)["models"]
    assert [item["state"] for item in found] == ["runs", "runs"]
    assert [item["revisions"][0]["refs"] for item in found] == [["main"], ["main"]]
    assert [len(item["revisions"]) for item in found] == [2, 2]


def test_without_a_cache_there_is_nothing(invoke: Invoke, cache: Cache) -> None:
    assert invoke("list").stdout.startswith("no models in")
    cache.root.rmdir()
    assert json.loads(invoke("list", "--json").stdout)["models"] == []
    assert "is not in the hub's cache" in invoke("rm", "owner/name", "--yes").stderr


def test_a_damaged_entry_of_the_cache_hides_no_other(invoke: Invoke, cache: Cache, files: dict[str, Any]) -> None:
    cache.add("owner/good", files["not a Mixtral"])
    (cache.root / "models--broken").write_text("no folder")
    (cache.root / "models--owner--empty").mkdir()
    cache.add("owner/gone", files["runs"])
    for blob in (cache.root / "models--owner--gone" / "blobs").iterdir():
        blob.unlink()
    found = {item["model"]: item["state"] for item in json.loads(invoke("list", "--json").stdout)["models"]}
    assert found["owner/good"] == "not a Mixtral"
    assert found.get("owner/gone") != "runs"


def test_rm_frees_what_it_says_and_leaves_the_others(invoke: Invoke, cache: Cache, files: dict[str, Any]) -> None:
    cache.add("owner/one", files["runs"])
    # A commit that two repositories have, as copies do, is removed from one.
    for name in ("owner/two", "another/one", "zebra/one"):
        cache.add(name, files["not a Mixtral"])
    before = sum(path.stat().st_size for path in cache.root.rglob("blobs/*"))
    found = json.loads(invoke("rm", "owner/one", "--yes", "--json").stdout)
    after = sum(path.stat().st_size for path in cache.root.rglob("blobs/*"))
    assert before - after == found["freed_bytes"] > 0
    assert found["removed"] == [{"model": "owner/one", "commit": COMMITS[0]}]
    left = {repo.repo_id for repo in huggingface_hub.scan_cache_dir(cache.root).repos}
    assert left == {"owner/two", "another/one", "zebra/one"}


def test_of_two_revisions_one_is_removed_and_what_both_have_stays(invoke: Invoke, cache: Cache) -> None:
    cache.add("owner/name", {"a": b"both", "b": b"first"}, COMMITS[0], ())
    kept = cache.add("owner/name", {"a": b"both", "b": b"second!"}, COMMITS[1])
    assert "has no revision nowhere" in invoke("rm", "owner/name@nowhere", "--yes").stderr
    dry = invoke("rm", f"owner/name@{COMMITS[0][:8]}", "--dry-run")
    assert dry.stdout == "5 B would be freed\n"
    assert len(list(kept.parent.iterdir())) == 2
    assert invoke("rm", f"owner/name@{COMMITS[0][:8]}", "--yes").stdout == "5 B freed\n"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {"a": b"both", "b": b"second!"}
    assert invoke("rm", "https://huggingface.co/owner/name/tree/main", "--yes").exit_code == 0
    assert list(cache.root.glob("models--*")) == []


def test_rm_takes_nothing_else_than_models_of_the_cache(
    invoke: Invoke, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "owner" / "mine"
    mine.mkdir(parents=True)
    cache.add("owner/name", {"a": b"a"})
    for name, words in (
        ("owner/mine", "is a folder or file of your own"),
        ("8x7b", "is not of the form owner/name"),
        ("owner/absent", "is not in the hub's cache"),
        ("", "empty"),
    ):
        result = invoke("rm", "owner/name", name, "--yes")
        assert result.exit_code in (1, 2)
        assert words in result.stderr
    assert mine.is_dir()
    assert (cache.root / "models--owner--name").is_dir()


def test_without_a_terminal_rm_needs_a_yes(invoke: Invoke, cache: Cache) -> None:
    cache.add("owner/name", {"a": b"a"})
    result = invoke("rm", "owner/name", input=b"y\n")
    assert result.exit_code in (1, 2)
    assert "give --yes" in result.stderr
    assert (cache.root / "models--owner--name").is_dir()


@pytest.mark.parametrize(("answer", "stays"), [(b"n\n", True), (b"y\n", False)])
def test_on_a_terminal_rm_asks(cache: Cache, answer: bytes, stays: bool) -> None:
    cache.add("owner/name", {"a": b"12345"})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_mixtral", "rm", "owner/name"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(ours, answer)
        said = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            said += part
        process.wait(60)
    os.close(ours)
    assert b"Remove, and free 5 B? [y/N]" in said
    assert (b"5 B freed" in said) is not stays
    assert (process.returncode != 0) is stays
    assert (cache.root / "models--owner--name").exists() is stays


def test_pull_fetches_and_says_what_it_is(
    invoke: Invoke, cache: Cache, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def download(repository: str, revision: str | None, choose: Any, progress: Any) -> Path:
        asked.append((repository, revision, sorted(choose(files["convert first"]))))
        return cache.add("owner/name", files["convert first"])

    monkeypatch.setitem(Source.resolve.__globals__, "download", download)
    result = invoke("pull", "https://huggingface.co/owner/name/tree/v1")
    assert asked == [("owner/name", "v1", ["m.gguf"])]
    assert result.stdout.startswith("owner/name: ")
    assert "must be converted first: mlx-mixtral convert" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_pull_of_what_is_here_already(invoke: Invoke, tiny: Path) -> None:
    result = invoke("pull", tiny)
    assert result.exit_code in (1, 2)
    assert "there is nothing to download" in result.stderr
    assert_one_error(invoke("pull", "8x7b"), "owner/name")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"HF_HOME": "~/elsewhere"},
        {"XDG_CACHE_HOME": "/absent/cache"},
        {"HUGGINGFACE_HUB_CACHE": "/absent/old", "HF_HOME": "/absent/home"},
        {"HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "/absent/old"},
    ],
)
def test_the_cache_is_where_the_client_has_it(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert str(hub_cache()) == told


def test_names_for_completion_are_of_models_that_are_of_use(cache: Cache, files: dict[str, Any]) -> None:
    for state, content in files.items():
        cache.add(f"owner/{state.replace(' ', '-')}", content)
    (cache.root / "datasets--owner--data").mkdir()
    (cache.root / "models--owner--odd" / "snapshots").mkdir(parents=True)
    cache.add("owner/bad", {"config.json": b"[1]", "model.safetensors": b""})
    (cache.root / "models--owner--runs" / "snapshots" / ".DS_Store").touch()
    pipe = cache.add("owner/pipe", {"model.safetensors": b""})
    os.mkfifo(pipe / "config.json")
    assert cached_models() == ["owner/cannot-be-read", "owner/convert-first", "owner/runs"]
