"""``verify``: a line when all is well, a table and status 1 when not; ``--verify`` where a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Invoke, assert_one_error


@pytest.fixture
def damaged(tmp_path: Path, quantised: Path) -> Path:
    folder = Path(shutil.copytree(quantised, tmp_path / "damaged"))
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folder


def test_a_sound_folder_is_one_line(invoke: Invoke, quantised: Path) -> None:
    result = invoke("verify", quantised)
    assert result.exit_code == 0
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert "tensors are as written" in line


def test_damage_is_a_table_and_status_1(invoke: Invoke, damaged: Path) -> None:
    result = invoke("verify", damaged, env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert result.stderr == ""
    assert "1 problem\n" in result.stdout
    assert "model-00001-of-00007.safetensors" in result.stdout
    assert "conversion.json says" in result.stdout


def test_json_is_the_report(invoke: Invoke, damaged: Path, quantised: Path) -> None:
    result = invoke("verify", damaged, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert [problem["what"] for problem in report["problems"]] == ["model-00001-of-00007.safetensors"]
    sound = invoke("verify", quantised, "--json")
    assert sound.exit_code == 0
    assert json.loads(sound.stdout)["problems"] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("good.gguf", "convert it first: mlx-mixtral convert"),
        ("model.safetensors", "is a file, but only whole converted folders can be verified; give the folder"),
    ],
)
def test_a_file_is_told_what_to_do_instead(invoke: Invoke, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    assert_one_error(invoke("verify", tmp_path / name), name, words)


def test_generate_verifies_on_request(invoke: Invoke, damaged: Path, quantised: Path) -> None:
    assert_one_error(invoke("generate", damaged, "-p", "And", "-n", 1, "--verify"), "model-00001", "sha256")
    assert invoke("generate", quantised, "-p", "And", "-n", 1, "--verify").exit_code == 0
