"""Converting straight from a hub: nothing of the weights is stored, whatever breaks on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral_convert import convert
from tests.convert.hub_server import COMMIT, Hub, run, serve
from tests.convert.support import hashes, make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "repository", shards=3, num_hidden_layers=3)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("# Model")
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with serve(source) as running:
        yield running


def test_a_repository_is_converted_without_storing_its_weights(tmp_path: Path, hub: Hub, source: Path) -> None:
    result = run(tmp_path / "home", hub, tmp_path / "out")
    stored = run(tmp_path / "other-home", hub, tmp_path / "stored", stream=False)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "stored")
    convert(source, tmp_path / "local")
    local, streamed = hashes(tmp_path / "local"), hashes(tmp_path / "out")
    assert local.pop("conversion.json") != streamed.pop("conversion.json")
    assert local == streamed
    origin = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]
    assert (origin["name"], origin["revision"]) == ("owner/model", COMMIT)
    assert {len(file["sha256"]) for file in origin["files"].values()} == {64}
    weights = sum(path.stat().st_size for path in source.glob("model-*.safetensors"))
    small = sum((source / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    assert result["source_bytes"] == weights
    assert result["peak"] < small + 10_000 < weights / 10
    assert stored["peak"] >= weights
    print(f"peak extra disk: {result['peak']} bytes streamed, {stored['peak']} downloaded; weights {weights} bytes")


def test_every_weight_is_fetched_about_once_and_several_pieces_at_a_time(
    tmp_path: Path, hub: Hub, source: Path
) -> None:
    hub.together = 3
    run(tmp_path / "home", hub, tmp_path / "out")
    weights = sum(path.stat().st_size for path in source.glob("model-*.safetensors"))
    fetched = sum(count for _, _, count in hub.served)
    assert weights * 0.99 < fetched < weights + 3 * 2**17
    assert {name for name, _, _ in hub.served} == {path.name for path in source.glob("model-*.safetensors")}
    assert not [name for name in hub.whole if name.endswith(".safetensors")]
    assert hub.most_in_flight >= 3
    assert hub.revisions == {COMMIT}


@pytest.mark.parametrize("failures", [0.1, 0.3])
def test_broken_connections_are_resumed_where_they_broke(
    tmp_path: Path, hub: Hub, source: Path, failures: float
) -> None:
    convert(source, tmp_path / "local")
    hub.failures = failures
    result = run(tmp_path / "home", hub, tmp_path / "out")
    assert "error" not in result
    local, streamed = hashes(tmp_path / "local"), hashes(tmp_path / "out")
    del local["conversion.json"], streamed["conversion.json"]
    assert local == streamed
    assert len(set(hub.broken) - {""}) >= 3
    print(f"{dict(hub.broken)} of {len(hub.served)} requests broken, peak extra disk {result['peak']} bytes")
    # A short answer's bytes are kept: some requests begin in the middle of a piece.
    weights = sum(path.stat().st_size for path in source.glob("model-*.safetensors"))
    assert sum(count for _, _, count in hub.served) < weights + 3 * 2**17


def test_an_interrupted_stream_goes_on_even_from_a_downloaded_copy(tmp_path: Path, hub: Hub) -> None:
    run(tmp_path / "home", hub, tmp_path / "whole")
    broken = run(tmp_path / "home", hub, tmp_path / "out", stop_at=20)
    assert broken["notes"] == ["repeat the command to continue from layer 2 of 3"]
    hub.served.clear()
    assert run(tmp_path / "home", hub, tmp_path / "out", stop_at=20)["error"] == "KeyboardInterrupt"
    assert run(tmp_path / "home", hub, tmp_path / "out", stream=False)["resumed"] == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"status": 500}, "HubError", ["8 attempts failed (status 500)", "run the same command again"]),
        ({"failures": 1.0}, "HubError", ["8 attempts failed"]),
        ({"status": 403}, "HubError", ["status 403", "hf auth login"]),
        ({"status": 404}, "HubError", ["404"]),
        ({"ranges": False}, "HubError", ["does not serve byte ranges", "without --stream"]),
        ({"commit": "f" * 40}, "HubError", [f"asked for at commit {COMMIT}, the hub served {'f' * 40}"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_hub_that_fails_for_good_is_one_line(
    tmp_path: Path, hub: Hub, change: dict[str, Any], error: str, words: list[str]
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    if change.get("failures"):
        # Nothing at all arrives.
        hub.random.randint = lambda a, b: 0  # type: ignore[method-assign]
    result = run(tmp_path / "home", hub, tmp_path / "out")
    assert result["error"] == error
    assert "\n" not in result["message"]
    for word in ("owner/model", *words):
        assert word in result["message"]
    assert not (tmp_path / "out").exists()


def test_a_connection_lost_in_the_middle_keeps_what_is_done(tmp_path: Path, hub: Hub, source: Path) -> None:
    """The hub fails for good after a while; with the hub back the same command goes on."""
    weights = sum(path.stat().st_size for path in source.glob("model-*.safetensors"))

    class Fading(list[tuple[str, int, int]]):
        def append(self, item: tuple[str, int, int]) -> None:
            super().append(item)
            if sum(count for _, _, count in self) > weights * 0.6:
                hub.status = 503

    hub.served = Fading()
    broken = run(tmp_path / "home", hub, tmp_path / "out")
    assert broken["error"] == "HubError"
    assert broken["notes"] == ["repeat the command to continue from layer 2 of 3"]
    hub.served, hub.status = [], None
    assert run(tmp_path / "home", hub, tmp_path / "out")["resumed"] == 1
    assert sum(count for _, _, count in hub.served) < weights * 0.85 + 3 * 2**17


def test_an_interrupt_does_not_wait_for_a_hub_that_hangs(tmp_path: Path, hub: Hub) -> None:
    hub.hangs.set()
    started = time.monotonic()
    settings = {"MLX_MIXTRAL_TEST_INTERRUPT_S": "0.3", "MLX_MIXTRAL_TEST_TIMEOUT_S": "2"}
    result = run(tmp_path / "home", hub, tmp_path / "out", settings=settings)
    assert result["error"] == "KeyboardInterrupt"
    # One time-out of 2 s; eight attempts would take 16.
    assert time.monotonic() - started < 12
    assert not (tmp_path / "out").exists()


def test_offline_is_one_line_at_once(tmp_path: Path, hub: Hub) -> None:
    started = time.monotonic()
    result = run(tmp_path / "home", hub, tmp_path / "out", settings={"HF_HUB_OFFLINE": "1"})
    assert result["error"] == "HubError"
    assert "cannot be reached" in result["message"]
    assert time.monotonic() - started < 10


def test_a_repository_without_weights_is_one_line(tmp_path: Path, hub: Hub, source: Path) -> None:
    (source / "config.json").unlink()
    result = run(tmp_path / "home", hub, tmp_path / "out")
    assert (result["error"], result["message"].partition(", only ")[0]) == (
        "CheckpointError",
        "owner/model is not a checkpoint that can be converted: it has no config.json",
    )
    for file in [*source.glob("model*"), source / "consolidated.safetensors"]:
        file.unlink()
    result = run(tmp_path / "home", hub, tmp_path / "out")
    assert (result["error"], result["message"]) == (
        "HubError",
        "owner/model: the repository has no model*.safetensors weights (none); choose one that has",
    )
