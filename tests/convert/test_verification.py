"""``verify`` finds every kind of damage, in conversions whose hashes are right too."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Recipe, convert, verify
from tests.convert.support import load_arrays, make_checkpoint

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = make_checkpoint(folder / "source")
    (source / "tokenizer_config.json").write_text("{}")
    convert(source, folder / "out", recipe=Recipe(4, 32))
    return folder / "out"


@pytest.fixture
def folder(tmp_path: Path, converted: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def found(folder: Path) -> list[tuple[str, str]]:
    report = verify(folder)
    assert report.ok == (not report.problems)
    assert report.to_dict()["ok"] == report.ok
    return [(problem.what, problem.problem) for problem in report.problems]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a damaged file: what is left to find is in the file itself."""
    manifest = json.loads((folder / "conversion.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "conversion.json").write_text(json.dumps(manifest))


def test_a_conversion_as_written_has_no_problems(converted: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(converted, progress=lambda *step: seen.append(step))
    total = sum(path.stat().st_size for path in converted.iterdir() if path.name != "conversion.json")
    assert report.ok
    assert (report.files, report.hashed_bytes) == (6, total)
    assert report.tensors == sum(len(load_arrays(path)) for path in converted.glob("*.safetensors"))
    assert seen[-1] == (total, total)
    assert json.loads(json.dumps(report.to_dict()))["problems"] == []


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_one_flipped_bit_is_found_in_any_file(folder: Path, name: str) -> None:
    flip(folder / name, -2)
    problems = found(folder)
    assert problems[0][0] == name
    weights = name.endswith((".safetensors", ".index.json"))
    assert problems[0][1].startswith("has sha256 " if weights else "was changed after the conversion: it has sha256 ")
    assert "conversion.json says" in problems[0][1]


def test_files_too_many_and_too_few_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "adapter.safetensors").write_bytes(b"")
    (folder / "README.md").write_text("written by hand")
    (folder / ".DS_Store").write_bytes(b"")
    assert found(folder) == [
        ("tokenizer_config.json", "missing; conversion.json lists it"),
        ("adapter.safetensors", "conversion.json does not list it"),
    ]


def test_a_file_cut_short_is_told_by_both_sizes(folder: Path) -> None:
    path = folder / SHARD
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    problems = found(folder)
    assert problems[0] == (SHARD, f"has {size - 1} bytes, conversion.json says {size}")
    assert problems[1][0] == "model"


@pytest.mark.parametrize("kind", ["scales", "biases", "input_layernorm", "block_sparse_moe.gate"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_with_right_hashes(folder: Path, kind: str, value: float) -> None:
    info = next(info for name, info in read_header(folder / SHARD).items() if kind in name and info.dtype == "BF16")
    bits = 0x7FC0 if np.isnan(value) else 0x7F80
    data = bytearray((folder / SHARD).read_bytes())
    data[info.offset + info.nbytes - 2 : info.offset + info.nbytes] = bits.to_bytes(2, "little")
    (folder / SHARD).write_bytes(data)
    rehash(folder, SHARD)
    assert found(folder) == [(info.name, f"holds NaN or infinity, in {SHARD}")]


@pytest.mark.parametrize(("mode", "code"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F), ("nvfp4", 0xFF)])
def test_nan_among_scales_held_as_bytes_is_found(tmp_path: Path, mode: str, code: int) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "out", recipe=Recipe(mode=mode))
    assert verify(tmp_path / "out").ok
    path = tmp_path / "out" / SHARD
    info = next(info for name, info in read_header(path).items() if name.endswith(".scales"))
    data = bytearray(path.read_bytes())
    data[info.offset + 3] = code
    path.write_bytes(data)
    rehash(tmp_path / "out", SHARD)
    assert found(tmp_path / "out") == [(info.name, f"holds NaN or infinity, in {SHARD}")]


def test_shapes_are_checked_against_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    rehash(folder, "config.json")
    ((what, problem),) = found(folder)
    assert what == "model"
    assert "embed_tokens" in problem


def test_a_checkpoint_of_other_origin_is_checked_but_for_its_hashes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    report = verify(source)
    assert [problem.what for problem in report.problems] == ["conversion.json"]
    assert report.tensors > 10
    assert report.files == 0


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"files": {"../config.json": {"bytes": 1, "sha256": ""}}}', '{"files": {"a": 3}}']
)
def test_a_damaged_manifest_is_a_problem_and_stops_nothing_else(folder: Path, text: str) -> None:
    (folder / "conversion.json").write_text(text)
    report = verify(folder)
    assert [problem.what for problem in report.problems] == ["conversion.json"]
    assert report.tensors > 10


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "absent")


def swap_shards(folder: Path) -> None:
    """A whole shard of another conversion, sound in itself, with other bits in it."""
    convert(folder.parent / "source", folder.parent / "eight", recipe=Recipe(8, 32))
    shutil.copy(folder.parent / "eight" / SHARD, folder / SHARD)


def test_load_compares_the_sizes_of_weight_files_always(tmp_path: Path, folder: Path) -> None:
    make_checkpoint(tmp_path / "source")
    load(folder).close()
    swap_shards(folder)
    with pytest.raises(CheckpointError, match=rf"{SHARD} has \d+ bytes, conversion\.json says \d+; copy or convert"):
        load(folder)


def _flip_weight(folder: Path) -> None:
    flip(folder / SHARD, -5)


def _edit_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')


@pytest.mark.parametrize("damage", [_flip_weight, _edit_tokenizer])
def test_load_compares_hashes_on_request(folder: Path, damage: Callable[[Path], Any]) -> None:
    load(folder, verify=True).close()
    damage(folder)
    with pytest.raises(
        CheckpointError,
        match=r"(safetensors|tokenizer_config\.json): (was changed after the conversion: it )?has .*conversion\.json says",
    ):
        load(folder, verify=True)
    load(folder).close()


def test_verifying_what_has_no_hashes_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="F32")
    with pytest.raises(CheckpointError, match=r"has no conversion\.json to verify it with"):
        load(source, verify=True)
    assert load(source).logits([1, 2]).dtype == mx.float32


def test_an_edited_configuration_is_no_damage(folder: Path) -> None:
    """What a person changes is told apart from weights that are not as they were written."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 3]}))
    report = verify(folder)
    assert (report.ok, report.weights_ok, report.edited) == (False, True, ("config.json",))
    assert "was changed after the conversion" in report.problems[0].problem
    with pytest.raises(
        CheckpointError, match=r"config\.json: was changed after .* load without verifying if the change was intended"
    ):
        load(folder, verify=True)
    with load(folder) as model:
        assert model.config.eos_token_ids == (2, 3)
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert not verify(folder).weights_ok


@pytest.mark.parametrize("files", [{}, [], None, {"config.json": {"bytes": True, "sha256": ""}}])
def test_a_manifest_that_lists_nothing_proves_nothing(folder: Path, files: Any) -> None:
    manifest = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps(manifest | {"files": files}))
    for options in ({}, {"verify": True}):
        with pytest.raises(CheckpointError, match=r"conversion\.json: (there is no list of files|the entry of)"):
            load(folder, **options)
    assert found(folder)[0][0] == "conversion.json"


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_a_file_that_is_read_must_be_listed(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "conversion.json").read_text())
    del manifest["files"][name]
    (folder / "conversion.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"{name}: conversion\.json does not list it"):
        load(folder, verify=True)
    assert (name, "conversion.json does not list it") in found(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "tokenizer.model", "chat_template.jinja", "added_tokens.json"])
def test_files_too_many_do_not_pass(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{}")
    (folder / "notes.txt").write_text("by hand")
    with pytest.raises(CheckpointError, match=rf"{name}: conversion\.json does not list it"):
        load(folder, verify=True)
    (folder / name).unlink()
    load(folder, verify=True).close()


def test_weights_with_a_hidden_name_do_not_pass(folder: Path) -> None:
    """The index may name any file of the folder."""
    (folder / SHARD).rename(folder / f".{SHARD}")
    index, manifest = (
        json.loads((folder / n).read_text()) for n in ("model.safetensors.index.json", "conversion.json")
    )
    index["weight_map"] = {k: f".{v}" if v == SHARD else v for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    del manifest["files"][SHARD]
    (folder / "conversion.json").write_text(json.dumps(manifest))
    rehash(folder, "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=rf"\.{SHARD}: conversion\.json does not list it"):
        load(folder, verify=True)
    assert found(folder) == [(f".{SHARD}", "conversion.json does not list it")]
