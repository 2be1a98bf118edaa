"""Large files, which come in pieces: they go on where they were, and come whole from a hub that serves no pieces."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.convert.hub_server import Hub, serve
from tests.forks import run_python
from tests.processes import PYTHONPATH

DATA = bytes(range(256)) * 20
SCRIPT = """
import json, sys
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.hub import download, ranges, resolve
download.LARGE_BYTES, ranges.PIECE_BYTES, ranges.WAIT_S, ranges.ATTEMPTS = 1000, 700, 0.001, int(sys.argv[2])
seen = []
try:
    folder = resolve("owner/model", revision=sys.argv[1] or None, progress=lambda *step: seen.append(step))
    print(json.dumps({"folder": str(folder), "seen": seen}))
except MixtralError as error:
    print(json.dumps({"message": str(error), "kind": type(error).__name__}))
"""


def ask(home: Path, hub: Hub, revision: str = "", attempts: int = 100) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*", "PYTHONPATH": PYTHONPATH}
    done = run_python(SCRIPT, [revision, str(attempts)], environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    place = tmp_path / "repository"
    place.mkdir()
    (place / "config.json").write_bytes(b"{}")
    (place / "model.safetensors").write_bytes(DATA)
    return place


def blob(home: Path) -> Path:
    return home / "hub" / "models--owner--model" / "blobs" / hashlib.sha256(DATA).hexdigest()


def test_pieces_that_break_make_the_whole_file(tmp_path: Path, repository: Path) -> None:
    with serve(repository) as hub:
        hub.failures = 0.4
        result = ask(tmp_path / "home", hub)
    assert Path(result["folder"], "model.safetensors").read_bytes() == DATA
    assert Path(result["folder"], "model.safetensors").readlink().name == blob(tmp_path).name
    assert result["seen"][-1] == [len(DATA) + 2, len(DATA) + 2]
    assert hub.broken


def test_a_download_goes_on_where_it_was(tmp_path: Path, repository: Path) -> None:
    partial = blob(tmp_path / "home")
    partial.parent.mkdir(parents=True)
    partial.with_name(f"{partial.name}.incomplete").write_bytes(DATA[:3000])
    with serve(repository) as hub:
        result = ask(tmp_path / "home", hub)
    assert Path(result["folder"], "model.safetensors").read_bytes() == DATA
    assert sorted(start for _, start, _ in hub.served) == [3000, 3700, 4400, 5100]
    assert [path.name for path in partial.parent.glob("*.incomplete")] == []


def test_more_than_the_file_has_is_begun_again(tmp_path: Path, repository: Path) -> None:
    partial = blob(tmp_path / "home")
    partial.parent.mkdir(parents=True)
    partial.with_name(f"{partial.name}.incomplete").write_bytes(b"x" * (len(DATA) + 1))
    with serve(repository) as hub:
        result = ask(tmp_path / "home", hub)
    assert Path(result["folder"], "model.safetensors").read_bytes() == DATA


def test_what_came_before_a_failure_is_kept(tmp_path: Path, repository: Path) -> None:
    home = tmp_path / "home"
    with serve(repository) as hub:
        hub.failures, hub.failures_from = 1, 2100
        result = ask(home, hub, attempts=2)
        assert result["kind"] == "HubError"
        kept = next(blob(home).parent.glob("*.incomplete")).read_bytes()
        assert kept == DATA[: len(kept)]
        hub.failures = 0
        hub.served.clear()
        result = ask(home, hub)
    assert Path(result["folder"], "model.safetensors").read_bytes() == DATA
    assert min(start for _, start, _ in hub.served) == len(kept)


def test_a_hub_without_ranges_sends_it_whole(tmp_path: Path, repository: Path) -> None:
    with serve(repository) as hub:
        hub.ranges = False
        result = ask(tmp_path / "home", hub)
    assert Path(result["folder"], "model.safetensors").read_bytes() == DATA


def test_a_file_larger_than_the_disk_is_refused_before(tmp_path: Path, repository: Path) -> None:
    with serve(repository) as hub:
        hub.listed["model.safetensors"] = 2**49
        result = ask(tmp_path / "home", hub)
    assert result["kind"] == "HubError"
    assert "563 TB have to be downloaded and the disk of the hub's cache has" in result["message"]
    assert (hub.served, hub.whole) == ([], [])


@pytest.mark.parametrize("revision", ["../../../../x", "a/../../b", "/tmp/x", "a//b", "..", "a\nb"])
def test_a_revision_that_leads_elsewhere_is_refused(tmp_path: Path, repository: Path, revision: str) -> None:
    with serve(repository) as hub:
        result = ask(tmp_path / "home", hub, revision)
    assert result["kind"] == "InvalidRequestError"
    assert "is not the name of a branch, a tag or a commit" in result["message"]
    assert not (tmp_path / "home").exists()
