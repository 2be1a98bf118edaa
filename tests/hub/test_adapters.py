"""Adapters from a hub: which files come, and what repositories without one say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mixtral.errors import HubError
from mlx_mixtral.hub import adapter_files

from .test_hub import COMMIT, FILES, SCRIPT, FakeHub, ask, hub

__all__ = ["hub"]

ADAPTER = SCRIPT.replace("import resolve", "import Source").replace(
    "resolve(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]), ",
    "Source.parse(*json.loads(sys.argv[1])).resolve_adapter(",
)
CONFIG, PEFT, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


@pytest.mark.parametrize("weights", [PEFT, MLX])
def test_only_an_adapters_two_files_are_downloaded(tmp_path: Path, hub: FakeHub, weights: str) -> None:
    own = {CONFIG: b"{}", weights: b"numbers"}
    hub.files = (
        FILES | own | {"adapter_model.bin": b"pickle", "0000100_adapters.safetensors": b"older", "optimizer.pt": b""}
    )
    folder = Path(ask(tmp_path, hub.url, "owner/model", script=ADAPTER)["folder"])
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == own
    assert sorted(hub.downloads) == sorted(own)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask(tmp_path, hub.url, "owner/model", script=ADAPTER, settings=offline)["folder"] == str(folder)
    (folder / weights).unlink()
    lost = ask(tmp_path, hub.url, "owner/model", script=ADAPTER, settings=offline)
    assert (lost["error"], "the cached copy is not complete" in lost["message"]) == ("HubError", True)


def test_a_repository_without_one_is_refused_before_downloading(tmp_path: Path, hub: FakeHub) -> None:
    result = ask(tmp_path, hub.url, "owner/model", script=ADAPTER)
    assert result["error"] == "HubError"
    assert "owner/model: the repository has no adapter" in result["message"]
    assert result["message"].endswith("it holds a model")
    assert hub.downloads == []
    result = ask(tmp_path, hub.url, "owner/model:lora.gguf", script=ADAPTER)
    assert (result["error"], "is a GGUF file" in result["message"]) == ("CheckpointError", True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([CONFIG, "adapter_model.bin"], "as a pickle only"),
        ([f"lora/{CONFIG}", f"lora/{PEFT}"], "there is one in lora: download that folder and give its path"),
        ([PEFT], "there is only adapter_model.safetensors"),
        ([CONFIG], "there is only adapter_config.json"),
        (["lora.gguf"], "adapters as GGUF are not read"),
        ([], "choose another"),
    ],
)
def test_what_a_repository_has_instead_is_said(names: list[str], message: str) -> None:
    with pytest.raises(HubError, match=message):
        adapter_files(names)
