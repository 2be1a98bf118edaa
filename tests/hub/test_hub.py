"""Resolving sources against a small hub on this machine: which files come, and what each failure says."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from mlx_mixtral.errors import HubError
from mlx_mixtral.hub import download as downloads
from mlx_mixtral.hub import resolve
from mlx_mixtral.hub.listing import Listing, RemoteFile
from tests.forks import run_python
from tests.processes import PYTHONPATH

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.model": b"pieces",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"add_bos_token": true}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache-2.0",
    "model-00001-of-00002.safetensors": b"1" * 100,
    "model-00002-of-00002.safetensors": b"2" * 50,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "consolidated.safetensors": b"twice" * 100,
    "consolidated.00.pt": b"three times" * 100,
    "pytorch_model.bin": b"four times" * 100,
    "README.md": b"# Model",
    ".gitattributes": b"",
    "original/model.safetensors": b"five times" * 100,
}
ONE = RemoteFile(1, None, "0" * 40)
SMALL = sorted(name for name in FILES if name.startswith(("config", "generation", "tokenizer", "chat", "LICENSE")))
WEIGHTS = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]
# What the subprocess runs: huggingface_hub reads its settings when it is imported.
SCRIPT = """
import json, sys
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.hub import resolve
seen = []
try:
    folder = resolve(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]), progress=lambda *step: seen.append(step))
    print(json.dumps({"folder": str(folder), "seen": seen}))
except MixtralError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass
class FakeHub:
    """Answers of the hub, and the files asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    failure: tuple[int, str] | None = None
    downloads: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.tokens.add(self.headers["Authorization"])
            if "/nobody/" in path:
                self._fail(404, "RepoNotFound")
            elif "/gated/" in path:
                self._fail(403, "GatedRepo")
            elif "/no-such-revision" in path:
                self._fail(404, "RevisionNotFound")
            elif hub.failure is not None:
                self._fail(*hub.failure)
            elif path.startswith("/api/models/owner/model"):
                siblings = [self._entry(name) for name in hub.files]
                self._answer(json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode(), {})
            elif path.startswith("/owner/model/resolve/"):
                name = path.split("/resolve/", 1)[1].split("/", 1)[1]
                data = hub.files[name]
                hub.downloads.append(name)
                self._answer(data, {"X-Repo-Commit": COMMIT})
            else:
                self._fail(404, "EntryNotFound")

        def _entry(self, name: str) -> dict[str, Any]:
            data = hub.files[name]
            return {"rfilename": name, "size": len(data), "blobId": git_hash(data)}

        def _answer(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} said the hub")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def ask(
    home: Path, url: str, *args: Any, settings: dict[str, str] | None = None, script: str = SCRIPT, **options: Any
) -> dict[str, Any]:
    """``resolve(*args, **options)``, or another script, in a fresh process that knows only this hub.

    What it printed must be the result alone.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2", "PYTHONPATH": PYTHONPATH, "NO_PROXY": "*",
    }  # fmt: skip
    done = run_python(script, [json.dumps(args), json.dumps(options)], environment | (settings or {}))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    if "error" not in result:
        assert done.stderr == ""
    else:
        assert "\n" not in result["message"]
    return result


def present(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_only_the_files_that_are_read_are_downloaded(tmp_path: Path, hub: FakeHub) -> None:
    result = ask(tmp_path, hub.url, "owner/model")
    assert sorted(hub.downloads) == sorted(SMALL + WEIGHTS)
    assert present(result["folder"]) == {name: FILES[name] for name in SMALL + WEIGHTS}
    assert Path(result["folder"]).name == COMMIT
    total = sum(len(FILES[name]) for name in SMALL + WEIGHTS)
    assert result["seen"][-1] == [total, total]
    assert [done for done, _ in result["seen"]] == sorted(done for done, _ in result["seen"])
    assert len(result["seen"]) > 2


def test_the_hubs_client_finds_what_was_downloaded(tmp_path: Path, hub: FakeHub) -> None:
    folder = ask(tmp_path, hub.url, "owner/model@refs/pr/4", weights=False)["folder"]
    found = huggingface_hub.scan_cache_dir(tmp_path / "hub")
    assert found.warnings == []
    (repository,) = found.repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash, revision.refs) == ("owner/model", COMMIT, {"refs/pr/4"})
    assert str(revision.snapshot_path) == folder
    assert {file.file_name: file.blob_path.name for file in revision.files} == {n: git_hash(FILES[n]) for n in SMALL}
    assert all(file.file_path.is_symlink() for file in revision.files)


def test_the_token_goes_to_the_hub(tmp_path: Path, hub: FakeHub) -> None:
    ask(tmp_path, hub.url, "owner/model", settings={"HF_TOKEN": "hf_secret"})
    assert hub.tokens == {"Bearer hf_secret"}
    ask(tmp_path, hub.url, "owner/model", settings={"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
    assert hub.tokens == {"Bearer hf_secret", None}


def test_a_second_call_downloads_nothing(tmp_path: Path, hub: FakeHub) -> None:
    first = ask(tmp_path, hub.url, "owner/model")
    hub.downloads.clear()
    assert ask(tmp_path, hub.url, "owner/model@main")["folder"] == first["folder"]
    assert hub.downloads == []


def test_without_weights_only_small_files_come(tmp_path: Path, hub: FakeHub) -> None:
    result = ask(tmp_path, hub.url, "owner/model", weights=False)
    assert sorted(hub.downloads) == SMALL
    assert sorted(present(result["folder"])) == SMALL


def test_offline_the_cached_copy_is_used(tmp_path: Path, hub: FakeHub) -> None:
    first = ask(tmp_path, hub.url, "owner/model")
    hub.downloads.clear()
    offline = ask(tmp_path, hub.url, "owner/model", settings={"HF_HUB_OFFLINE": "1"})
    unreachable = ask(tmp_path, "http://127.0.0.1:9", "owner/model")
    hub.failure = (503, "")
    in_trouble = ask(tmp_path, hub.url, "owner/model")
    assert first["folder"] == offline["folder"] == unreachable["folder"] == in_trouble["folder"]
    assert hub.downloads == []


def test_offline_an_incomplete_copy_is_named(tmp_path: Path, hub: FakeHub) -> None:
    folder = Path(ask(tmp_path, hub.url, "owner/model")["folder"])
    (folder / WEIGHTS[1]).unlink()
    result = ask(tmp_path, hub.url, "owner/model", settings={"HF_HUB_OFFLINE": "1"})
    assert result["error"] == "HubError"
    assert f"lacks {WEIGHTS[1]} and the hub cannot be reached" in result["message"]
    small = ask(tmp_path, hub.url, "owner/model", weights=False, settings={"HF_HUB_OFFLINE": "1"})
    assert small["folder"] == str(folder)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (
            "gated/model",
            {},
            ["gated/model is gated", "accept its licence on https://huggingface.co/gated/model", "HF_TOKEN"],
        ),
        ("nobody/model", {}, ["nobody/model", "no such public repository", "hf auth login"]),
        ("owner/model@no-such-revision", {}, ["owner/model has no revision 'no-such-revision'"]),
        ("owner/model", {"revision": "no-such-revision"}, ["no revision 'no-such-revision'"]),
    ],
)
def test_what_the_hub_refuses_is_explained(
    tmp_path: Path, hub: FakeHub, source: str, options: dict[str, Any], words: list[str]
) -> None:
    result = ask(tmp_path, hub.url, source, **options)
    assert result["error"] == "HubError"
    for word in words:
        assert word in result["message"]
    assert hub.downloads == []


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_connection_and_no_cached_copy(tmp_path: Path, hub: FakeHub, settings: dict[str, str]) -> None:
    result = ask(tmp_path, hub.url, "owner/model", settings=settings)
    assert result["error"] == "HubError"
    assert "the hub cannot be reached and there is no cached copy" in result["message"]


def test_a_cache_that_another_program_began_is_used_offline(tmp_path: Path, hub: FakeHub) -> None:
    """The hub's client notes what a repository has, and would call this copy incomplete."""
    trees = pytest.importorskip("huggingface_hub._tree_cache")
    folder = Path(ask(tmp_path, hub.url, "owner/model")["folder"])
    entry = trees.TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    trees.write_tree_cache(str(folder.parents[1]), COMMIT, dict.fromkeys(FILES, entry))
    assert list(folder.parents[1].glob("trees/*"))
    assert ask(tmp_path, hub.url, "owner/model", settings={"HF_HUB_OFFLINE": "1"})["folder"] == str(folder)


@pytest.mark.parametrize("commit", ["../../../elsewhere", "elsewhere", ""])
def test_a_cached_revision_is_a_commit(tmp_path: Path, hub: FakeHub, commit: str) -> None:
    folder = Path(ask(tmp_path, hub.url, "owner/model")["folder"])
    for place in (tmp_path / "elsewhere", folder.parent / "elsewhere"):
        place.mkdir()
        (place / "config.json").write_bytes(b"{}")
    (folder.parents[1] / "refs" / "main").write_text(commit)
    result = ask(tmp_path, hub.url, "owner/model", weights=False, settings={"HF_HUB_OFFLINE": "1"})
    assert result["error"] == "HubError"
    assert "there is no cached copy" in result["message"]


def test_a_refused_token_is_explained(tmp_path: Path, hub: FakeHub) -> None:
    hub.failure = (401, "")
    result = ask(tmp_path, hub.url, "owner/model")
    assert result["error"] == "HubError"
    assert "HF_TOKEN" in result["message"]


def test_a_repository_without_safetensors_is_refused_before_downloading(tmp_path: Path, hub: FakeHub) -> None:
    hub.files = {name: data for name, data in FILES.items() if not name.startswith("model") or "/" in name}
    result = ask(tmp_path, hub.url, "owner/model")
    assert result["error"] == "HubError"
    assert (
        "owner/model: the repository has no model*.safetensors weights (only consolidated.00.pt and 2 more)"
        in (result["message"])
    )
    assert hub.downloads == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        downloads, "list_files", lambda *args: Listing("owner/model", COMMIT, {"model.safetensors": ONE})
    )
    monkeypatch.setattr(downloads, "store_files", full)
    with pytest.raises(HubError, match=r"owner/model: the disk of the hub's cache is full.*HF_HOME"):
        resolve("owner/model")


BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
NATIVE = ["consolidated.00.pt", "consolidated.01.pt"]
SPLIT = ["big.Q8_0-00001-of-00002.gguf", "big.Q8_0-00002-of-00002.gguf"]


@pytest.mark.parametrize("source", ["owner/model:a.gguf", "owner/model@main:a.gguf"])
def test_a_named_gguf_comes_alone_and_offline_from_the_cache(tmp_path: Path, hub: FakeHub, source: str) -> None:
    hub.files = {"a.gguf": b"GGUFa", "b.gguf": b"GGUFb", "model.safetensors": b"x", "tokenizer.model": b"pieces"}
    result = ask(tmp_path, hub.url, source, convertible=True)
    assert Path(result["folder"]).read_bytes() == b"GGUFa"
    assert sorted(hub.downloads) == ["a.gguf", "tokenizer.model"]
    assert ask(tmp_path, hub.url, source, convertible=True, settings={"HF_HUB_OFFLINE": "1"}) | {
        "seen": 0
    } == result | {"seen": 0}
    other = ask(tmp_path, hub.url, "owner/model:b.gguf", convertible=True, settings={"HF_HUB_OFFLINE": "1"})
    assert other["error"] == "HubError"
    assert "has no file b.gguf" in other["message"]


def test_a_named_gguf_is_for_the_converter(tmp_path: Path, hub: FakeHub) -> None:
    result = ask(tmp_path, hub.url, "owner/model:a.gguf")
    assert result["error"] == "CheckpointError"
    assert "has to be converted first: mlx-mixtral convert owner/model:a.gguf DEST" in result["message"]
    assert hub.downloads == []


def test_offline_every_file_of_an_index_or_a_split_has_to_be_there(tmp_path: Path, hub: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": BIN[0], "b": BIN[1]}}).encode()
    hub.files = {"config.json": b"{}", BIN[0]: b"1", BIN[1]: b"2", BIN[2]: index}
    folder = Path(ask(tmp_path / "bin", hub.url, "owner/model", convertible=True)["folder"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.files)
    (folder / BIN[1]).unlink()
    offline = {"HF_HUB_OFFLINE": "1"}
    result = ask(tmp_path / "bin", hub.url, "owner/model", convertible=True, settings=offline)
    assert f"lacks {BIN[1]} and the hub cannot be reached" in result["message"]
    hub.files = dict.fromkeys(SPLIT, b"GGUF")
    folder = Path(ask(tmp_path / "gguf", hub.url, "owner/model", convertible=True)["folder"])
    (folder / SPLIT[1]).unlink()
    result = ask(tmp_path / "gguf", hub.url, "owner/model", convertible=True, settings=offline)
    assert f"lacks {SPLIT[1]} and the hub cannot be reached" in result["message"]
