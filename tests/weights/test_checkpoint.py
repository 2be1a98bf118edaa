"""Which file holds a tensor: the index decides, and no name in it leaves the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlx_mixtral.config.layout import Rows
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights import checkpoint as checkpoint_module
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader

INDEX = "model.safetensors.index.json"
A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.arange(8, dtype=np.uint8).reshape(2, 4)


def _save(path: Path, **arrays: np.ndarray[Any, Any]) -> None:
    safetensors.numpy.save_file(dict(arrays), path)


def _index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    _save(folder / "model-00001-of-00002.safetensors", a=A)
    _save(folder / "model-00002-of-00002.safetensors", b=B)
    _index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def test_a_sharded_folder_is_one_mapping_of_tensors(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert dict(checkpoint) == {"a": checkpoint["a"], "b": checkpoint["b"]}
    assert len(checkpoint) == 2
    assert "a" in checkpoint
    assert "c" not in checkpoint
    assert checkpoint["a"].shape == (4, 3)
    assert checkpoint["b"].file == sharded / "model-00002-of-00002.safetensors"
    assert checkpoint.nbytes == A.nbytes + B.nbytes
    assert checkpoint.files == sorted(sharded.glob("*.safetensors"))


def test_the_index_decides_when_two_files_have_the_tensor(sharded: Path) -> None:
    _save(sharded / "model-00002-of-00002.safetensors", b=B, a=A + 100)
    checkpoint = Checkpoint(sharded)
    assert checkpoint["a"].file.name == "model-00001-of-00002.safetensors"
    _index(sharded, dict.fromkeys("ab", "model-00002-of-00002.safetensors"))
    checkpoint = Checkpoint(sharded)
    assert checkpoint["a"].file.name == "model-00002-of-00002.safetensors"
    assert [file.name for file in checkpoint.files] == ["model-00002-of-00002.safetensors"]


def test_files_and_tensors_the_index_does_not_name_are_ignored(sharded: Path) -> None:
    _save(sharded / "consolidated.safetensors", c=A)
    (sharded / "broken.safetensors").write_bytes(b"not safetensors")
    _save(sharded / "model-00001-of-00002.safetensors", a=A, unnamed=A)
    assert set(Checkpoint(sharded)) == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/inside.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "../model/model-00001-of-00002.safetensors",
        None,
        3,
        ["model-00001-of-00002.safetensors"],
    ],
)
def test_an_index_never_leads_out_of_the_folder(sharded: Path, name: Any) -> None:
    for place in (sharded.parent / "outside.safetensors", sharded / "sub" / "inside.safetensors"):
        place.parent.mkdir(exist_ok=True)
        _save(place, a=A)
    _index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match="which is not a file of this folder") as caught:
        Checkpoint(sharded)
    assert "'a'" in str(caught.value)


def test_an_absolute_path_to_a_file_of_the_folder_is_refused_too(sharded: Path) -> None:
    _index(sharded, {"a": str(sharded / "model-00001-of-00002.safetensors")})
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "x" * 5000])
def test_an_absent_file_is_named(sharded: Path, name: str) -> None:
    _index(sharded, {"a": "model-00001-of-00002.safetensors", "b": name})
    with pytest.raises(CheckpointError, match="download it again") as caught:
        Checkpoint(sharded)
    assert repr(name)[:100] in str(caught.value)


def test_a_tensor_that_its_file_does_not_have_is_named(sharded: Path) -> None:
    _index(sharded, {"b": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"places tensor 'b' in 'model-00001-of-00002\.safetensors', which does not"
    ):
        Checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a", 3, [["a", "b"]]])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    _index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="weight_map is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_a_broken_index_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(sharded)


def test_a_truncated_shard_is_refused_at_opening(sharded: Path) -> None:
    file = sharded / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(sharded)


def test_without_an_index_the_standard_name_wins(tmp_path: Path) -> None:
    _save(tmp_path / "other.safetensors", b=B)
    assert set(Checkpoint(tmp_path)) == {"b"}  # a single file may have any name
    _save(tmp_path / "model.safetensors", a=A)
    assert set(Checkpoint(tmp_path)) == {"a"}


@pytest.mark.parametrize(
    ("files", "ignored"),
    [
        (("one.safetensors", "two.safetensors"), ()),
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), ("other.safetensors",)),
        (("weights.00.safetensors", "weights.01.safetensors"), ("consolidated.safetensors",)),
        (("weights.0.safetensors", "weights.1.safetensors"), ("adapters.safetensors", "adapter_model.safetensors")),
    ],
)
def test_without_an_index_the_headers_say_where_tensors_are(
    tmp_path: Path, files: tuple[str, str], ignored: tuple[str, ...]
) -> None:
    for name, tensors in zip(files, ({"a": A}, {"b": B}), strict=True):
        _save(tmp_path / name, **tensors)
    for name in ignored:
        _save(tmp_path / name, a=A + 1)
    checkpoint = Checkpoint(tmp_path)
    assert {name: info.file.name for name, info in checkpoint.items()} == dict(zip("ab", files, strict=True))


def test_without_an_index_a_tensor_may_be_in_one_file_only(tmp_path: Path) -> None:
    _save(tmp_path / "one.safetensors", a=A)
    _save(tmp_path / "two.safetensors", a=A, b=B)
    with pytest.raises(
        CheckpointError, match=r"two\.safetensors: tensor 'a' is in one\.safetensors too, and there is no"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_without_an_index_a_missing_shard_is_named(tmp_path: Path, missing: int) -> None:
    for number in {1, 2, 3} - {missing}:
        _save(tmp_path / f"model-{number:05}-of-00003.safetensors", **{f"t{number}": A})
    with pytest.raises(
        CheckpointError, match=f"model-0000{missing}-of-00003.safetensors is missing; it is one of the 3 files"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "base_model.model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.base_model.model.",
     "base_model.model._orig_mod."],
)  # fmt: skip
def test_what_a_trainer_puts_around_names_is_taken_off(tmp_path: Path, wrapper: str) -> None:
    _save(tmp_path / "model.safetensors", **{f"{wrapper}lm_head.weight": A, f"{wrapper}model.norm.weight": B})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == {"lm_head.weight", "model.norm.weight"}
    assert checkpoint["lm_head.weight"].name == f"{wrapper}lm_head.weight"


def test_wrappers_in_the_middle_are_taken_off(tmp_path: Path) -> None:
    names = [
        "model._orig_mod.norm.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
    ]
    _save(tmp_path / "model.safetensors", **dict.fromkeys(names, A))
    assert set(Checkpoint(tmp_path)) == {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", **{"module.lm_head.weight": A, "lm_head.weight": A})
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' and 'module\.lm_head\.weight' are both 'lm_head\.weight'"
    ):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="has no weights"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.gguf", r"holds a GGUF file \(model\.gguf\), which must be converted first: mlx-mixtral convert "),
        ("consolidated.00.pth", "holds Mistral's own files"),
        ("weights.0.npz", "holds files of MLX's first examples"),
        ("pytorch_model-00001-of-00002.bin", "holds PyTorch files"),
        ("adapters.npz", "holds an adapter .* and no model"),
    ],
)
def test_weights_that_only_the_converter_reads_are_named(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.safetensors", "weights.00.safetensors"])
def test_mistrals_own_names_are_sent_to_the_converter(tmp_path: Path, name: str) -> None:
    _save(tmp_path / name, **{"tok_embeddings.weight": A})
    with pytest.raises(
        CheckpointError, match=f"Mistral's own .*{name}.*, which must be converted first: mlx-mixtral convert"
    ):
        Checkpoint(tmp_path)


def test_a_git_lfs_pointer_is_named_as_that(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a git-lfs pointer.*git lfs pull"):
        Checkpoint(tmp_path)


def test_a_missing_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' is missing"):
        Checkpoint(sharded)["model.norm.weight"]


def test_rows_are_given_only_of_a_tensor_with_the_promised_shape(tmp_path: Path) -> None:
    stacked = np.zeros((3, 4, 5), np.float32)
    _save(tmp_path / "model.safetensors", flat=stacked.reshape(12, 5), stacked=stacked, vector=np.zeros(12, np.float32))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.rows_of(Rows("flat", 4, 8, 12)) is checkpoint["flat"]
    assert checkpoint.rows_of(Rows("stacked", 4, 8, 12, 3)) is checkpoint["stacked"]
    for rows in (
        Rows("flat", 0, 4, 11),
        Rows("flat", 0, 4, 12, 3),
        Rows("stacked", 0, 4, 12),
        Rows("stacked", 0, 4, 12, 4),
        Rows("stacked", 0, 4, 15, 3),
        Rows("vector", 0, 12, 12),
    ):
        with pytest.raises(CheckpointError, match=f"tensor '{rows.name}' has shape .* the configuration calls for"):
            checkpoint.rows_of(rows)
    with pytest.raises(CheckpointError, match="'absent' is missing"):
        checkpoint.rows_of(Rows("absent", 0, 1, 1))


def _open_files() -> set[str]:
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
    found = set()
    for entry in folder.iterdir():
        try:
            found.add(os.path.realpath(entry))
        except OSError:
            continue
    return found


@pytest.fixture
def proc() -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see open files")


def test_a_reader_reads_any_rows_and_closes_its_files(sharded: Path, proc: None) -> None:
    checkpoint = Checkpoint(sharded)
    assert not {str(file.resolve()) for file in checkpoint.files} & _open_files()
    with CheckpointReader(checkpoint) as reader:
        assert {str(file.resolve()) for file in checkpoint.files} <= _open_files()
        for start in range(4):
            for stop in range(start, 5):
                raw = reader.rows(checkpoint["a"], start, stop)
                np.testing.assert_array_equal(raw.view(np.float32), A[start:stop])
        buffer = bytearray(5)
        reader.read(checkpoint["b"], memoryview(buffer), 2)
        assert bytes(buffer) == B.tobytes()[2:7]
    assert not {str(file.resolve()) for file in checkpoint.files} & _open_files()


def test_a_file_gone_since_opening_is_named_and_the_others_are_closed(sharded: Path, proc: None) -> None:
    checkpoint = Checkpoint(sharded)
    gone = checkpoint.files[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name} cannot be read"):
        CheckpointReader(checkpoint)
    assert str(checkpoint.files[0].resolve()) not in _open_files()


def test_opening_reads_the_header_of_each_named_file_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(sharded / "model-00001-of-00002.safetensors", a=A, c=A)
    _index(sharded, dict.fromkeys("ac", "model-00001-of-00002.safetensors"))
    read: list[str] = []
    plain = checkpoint_module.read_header

    def counting(path: Path) -> Any:
        read.append(path.name)
        return plain(path)

    monkeypatch.setattr(checkpoint_module, "read_header", counting)
    Checkpoint(sharded)
    assert read == ["model-00001-of-00002.safetensors"]
