"""What a user names as a model, and which files of a repository are read; no hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mixtral.errors import CheckpointError, HubError, InvalidRequestError
from mlx_mixtral.hub import Source, resolve, wanted_files

from .test_hub import BIN, NATIVE, SPLIT


def test_folders_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path) == tmp_path
    assert resolve("owner/model") == Path("owner/model")
    with pytest.raises(InvalidRequestError, match="is a folder; revision 'main' applies to hub repositories only"):
        resolve("owner/model", revision="main")


@pytest.mark.parametrize(
    "source", ["absent", "./absent", "../owner/model", "/absent/model", "a/b/c", "~/absent", "x y/z"]
)
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(source)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(Path(source))


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint folder"):
        resolve(tmp_path / "model.safetensors")


def test_repositories_and_revisions_are_told_apart() -> None:
    def parse(source: str, revision: str | None = None) -> tuple[str | None, str | None]:
        found = Source.parse(source, revision)
        assert (found.name, found.path, found.file) == (source, None, None)
        return found.repository, found.revision

    assert parse("owner/model") == ("owner/model", None)
    assert parse("owner/model-v0.1@refs/pr/4") == ("owner/model-v0.1", "refs/pr/4")
    assert parse("owner/model", "v1") == ("owner/model", "v1")
    assert parse("owner/model@v1", "v1") == ("owner/model", "v1")
    assert Source.parse(Path("owner/model")) == Source("owner/model", Path("owner/model"))
    with pytest.raises(InvalidRequestError, match="names revision 'v1', the argument 'v2'"):
        parse("owner/model@v1", "v2")
    with pytest.raises(InvalidRequestError, match="the source is an empty name"):
        parse("")


def test_single_files_and_other_names_are_chosen_too() -> None:
    assert wanted_files(["config.json", "model.safetensors", "adapter.safetensors"]) == [
        "config.json",
        "model.safetensors",
    ]
    assert wanted_files(["config.json", "weights.safetensors", "consolidated.safetensors"]) == [
        "config.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["config.json", *BIN, *NATIVE, "optimizer.bin"], BIN),
        (["config.json", "pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["params.json", *NATIVE, "small.gguf"], NATIVE),
        (["params.json", "consolidated.00.pth", *NATIVE], ["consolidated.00.pth"]),
        (["params.json", "consolidated.safetensors", *NATIVE], ["consolidated.safetensors"]),
        (["config.json", "model.safetensors", *BIN, *NATIVE, *SPLIT], ["model.safetensors"]),
        (["small.gguf", "README.md"], ["small.gguf"]),
        (SPLIT, SPLIT),
        (["config.json", "weights.0.npz", "weights.1.npz"], ["weights.0.npz", "weights.1.npz"]),
    ],
)
def test_the_converter_takes_one_kind_of_weights(names: list[str], weights: list[str]) -> None:
    small = [name for name in names if name in ("config.json", "params.json")]
    assert sorted(wanted_files(names, convertible=True)) == sorted(small + weights)
    if "model.safetensors" not in names and "consolidated.safetensors" not in names:
        with pytest.raises(HubError, match="mlx-mixtral convert reads those, downloaded whole"):
            wanted_files(names)


def test_one_gguf_of_several_has_to_be_named() -> None:
    names = ["config.json", "a.Q4_0.gguf", "a.Q8_0.gguf", *SPLIT]
    with pytest.raises(
        HubError, match=r"has 3 GGUF files; name one as owner/name:FILE, of a\.Q4_0\.gguf, a\.Q8_0\.gguf, big"
    ):
        wanted_files(names, convertible=True)
    assert wanted_files(names, convertible=True, file="a.Q8_0.gguf") == ["config.json", "a.Q8_0.gguf"]
    assert wanted_files(names, convertible=True, file=SPLIT[0]) == ["config.json", *SPLIT]
    with pytest.raises(HubError, match=r"has no file b\.gguf; it has a\.Q4_0\.gguf"):
        wanted_files(names, convertible=True, file="b.gguf")


def test_a_file_of_a_repository_is_told_apart() -> None:
    text = "owner/model:a.Q4_0.gguf"
    assert Source.parse(text) == Source(text, None, "owner/model", None, "a.Q4_0.gguf")
    text = "owner/model@refs/pr/4:a.gguf"
    assert Source.parse(text) == Source(text, None, "owner/model", "refs/pr/4", "a.gguf")
    for text in ("owner/model:../a.gguf", "owner/model:a.bin"):
        assert Source.parse(text) == Source(text, Path(text))
