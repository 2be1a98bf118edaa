"""What cannot be streamed, and hubs that do not serve what they list: one line each, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert import convert
from tests.convert.hub_server import COMMIT, Hub, run_all, serve
from tests.convert.sources.test_streamed_kinds import of_awq, of_gguf, of_gptq, of_split_gguf, of_torch, of_torch_native

Make = Callable[[Path], None]


def cut(name: str, keep: float) -> Callable[[Hub], None]:
    """Only the first part of a file lies on the hub."""

    def change(hub: Hub) -> None:
        data = (hub.folder / name).read_bytes()
        (hub.folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def with_(**attributes: Any) -> Callable[[Hub], None]:
    def change(hub: Hub) -> None:
        for name, value in attributes.items():
            setattr(hub, name, value)

    return change


def remove(name: str) -> Callable[[Hub], None]:
    return lambda hub: (hub.folder / name).unlink()


def overwrite(name: str, data: bytes) -> Callable[[Hub], None]:
    def change(hub: Hub) -> None:
        (hub.folder / name).write_bytes(data)

    return change


SHARD = "model-00002-of-00002.safetensors"
CASES: list[tuple[Make, str, Callable[[Hub], None], str, list[str]]] = [
    (of_gguf, "", with_(ranges=False), "HubError", ["does not serve byte ranges of m.gguf", "convert without --stream"]),
    (of_torch, "", with_(ranges=False), "HubError", ["does not serve byte ranges of pytorch_model.bin"]),
    (of_gguf, "", with_(commit="f" * 40), "HubError", [f"asked for at commit {COMMIT}, the hub served {'f' * 40}"]),
    (of_gguf, "", with_(listed={"m.gguf": 10**6}), "HubError", ["m.gguf has 1000000 bytes, the hub served", "it changed"]),
    (of_awq, "", with_(listed={SHARD: 10**5}), "HubError", [f"{SHARD} has 100000 bytes, the hub served", "it changed"]),
    (of_gguf, ":n.gguf", with_(), "HubError", ["the repository has no file n.gguf; it has m.gguf"]),
    (of_awq, ":n.gguf", with_(), "HubError", ["the repository has no file n.gguf; nor any GGUF"]),
    (of_split_gguf, "", with_(), "HubError", ["has 2 GGUF files; name one as owner/name:FILE, of m-00001-of-00003.gguf"]),
    (of_gguf, "", cut("m.gguf", 0.7), "CheckpointError", ["owner/model/m.gguf is truncated: tensor"]),
    (of_gguf, ":m.gguf", cut("m.gguf", 0.0002), "CheckpointError", ["owner/model/m.gguf is truncated"]),
    (of_gguf, ":m.gguf", overwrite("m.gguf", b"<html>"), "CheckpointError", ["owner/model/m.gguf is not a checkpoint"]),
    (of_gguf, ":m.gguf", overwrite("m.gguf", b""), "CheckpointError", ["owner/model/m.gguf is not a checkpoint"]),
    (of_split_gguf, ":m-00001-of-00003.gguf", remove("m-00002-of-00003.gguf"), "CheckpointError",
     ["owner/model: m-00002-of-00003.gguf is missing; it is one of the 3 files"]),
    (of_gptq, "", cut(SHARD, 0.5), "CheckpointError", [f"owner/model/{SHARD}", "the file is truncated"]),
    (of_gptq, "", remove(SHARD), "CheckpointError", [f"names {SHARD!r}, which is not in owner/model;"]),
    (of_torch, "", cut("pytorch_model.bin", 0.9), "CheckpointError", ["model.bin is not a readable torch file"]),
    (of_torch_native, "", with_(status=503), "HubError", ["consolidated.00.pt cannot be fetched at", "8 attempts failed"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "file", "change", "error", "words"), CASES)
def test_it_is_one_line_and_nothing_is_left(
    tmp_path: Path, make: Make, file: str, change: Callable[[Hub], None], error: str, words: list[str]
) -> None:
    make(tmp_path / "repository")
    with serve(tmp_path / "repository") as hub:
        change(hub)
        conversion = {"dest": tmp_path / "out", "stream": True}
        (result,) = run_all(tmp_path / "home", hub, [conversion], source=f"owner/model{file}")
    assert result["error"] == error, result
    assert "\n" not in result["message"]
    for word in ("owner/model", *words):
        assert word in result["message"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "floats") == ["home", "repository"]
    assert result["peak"] < 50_000


def test_what_lies_on_this_machine_is_not_streamed(tmp_path: Path) -> None:
    of_gguf(tmp_path / "repository")
    for source in (
        tmp_path / "repository",
        tmp_path / "repository" / "m.gguf",
        str(tmp_path / "absent.gguf"),
        "m.gguf",
    ):
        with pytest.raises(InvalidRequestError, match="is not a hub repository; stream applies only to those"):
            convert(source, tmp_path / "out", stream=True)


def test_a_kind_that_reads_folders_is_not_forced_on_one_file(tmp_path: Path) -> None:
    of_gguf(tmp_path / "repository")
    with serve(tmp_path / "repository") as hub:
        conversion = {"dest": tmp_path / "out", "stream": True, "kind": "awq"}
        (result,) = run_all(tmp_path / "home", hub, [conversion], source="owner/model:m.gguf")
    assert result["message"] == "owner/model/m.gguf is one file; kind awq is read from a folder"
