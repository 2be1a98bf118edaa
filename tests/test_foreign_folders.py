"""Folders that hold no model this runtime reads: each message says what they are and what to do, and that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import CheckpointError, ConfigError, ConversionError, TokenizerError
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral_convert import convert
from tests.convert.native_writer import make_native, native
from tests.convert.support import CONFIG, make_checkpoint, weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n"


@pytest.mark.parametrize("file", ["consolidated.safetensors", "consolidated.{}.pth"])
def test_mistrals_own_folder_is_sent_to_the_converter(tmp_path: Path, file: str) -> None:
    source = make_native(tmp_path / "source", native(weights(CONFIG), CONFIG), CONFIG, file)
    (source / "tokenizer.model.v3").unlink()
    with pytest.raises(
        CheckpointError, match=r"Mistral's own .*, which must be converted first: mlx-mixtral convert .*source DEST"
    ):
        load(source)
    convert(source, tmp_path / "out")
    with load(tmp_path / "out") as model:
        assert model.config.num_local_experts == 4


def test_mistrals_own_folder_needs_its_parameters(tmp_path: Path) -> None:
    source = make_native(tmp_path / "source", native(weights(CONFIG), CONFIG), CONFIG, "consolidated.safetensors")
    (source / "tokenizer.model.v3").unlink()
    kept = (source / "params.json").read_bytes()
    (source / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"Mistral's own weights, but not params\.json.*put the original one"):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must be converted first"):
        load(source)
    (source / "params.json").write_bytes(kept)
    convert(source, tmp_path / "out")


PEFT = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1", "r": 8}
MLX_LM = {"fine_tune_type": "lora", "model": "mistralai/Mixtral-8x7B-v0.1", "lora_parameters": {"rank": 8}}


@pytest.mark.parametrize(
    ("config", "file", "match"),
    [
        (PEFT, "adapter_model.safetensors",
         r"an adapter of PEFT, which modifies mistralai/Mixtral-8x7B-v0\.1 and is not a model itself; .*v0\.1 DEST --adapter "),
        (PEFT, "adapter_model.bin", "an adapter of PEFT"),
        (MLX_LM, "adapters.safetensors",
         r"an adapter of mlx-lm, .*convert mistralai/Mixtral-8x7B-v0\.1 DEST --adapter "),
        (MLX_LM | {"model": 3}, "adapters.safetensors", "which modifies another model"),
    ],
)  # fmt: skip
def test_an_adapter_is_called_one(tmp_path: Path, config: dict[str, Any], file: str, match: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones(1)})
    (tmp_path / "x.safetensors").rename(tmp_path / file)
    runs: list[Callable[[], object]] = [lambda: load(tmp_path), lambda: convert(tmp_path, tmp_path.parent / "out")]
    for run in runs:
        with pytest.raises(CheckpointError, match=match) as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["hqq", "quanto", "torchao", "exl2"])
def test_methods_that_nothing_here_reads_are_not_sent_in_a_circle(tmp_path: Path, method: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": method}}))
    fix = r"use the unquantised original, or what transformers' model\.dequantize\(\) and save_pretrained\(\) write"
    with pytest.raises(ConfigError, match=f"quantised with '{method}'; .*{fix}"):
        load(source)
    with pytest.raises(ConversionError, match=rf"quantised with {method} \(.*not supported; convert from the original"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer_in_a_folder_is_named(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / name).write_bytes(POINTER)
    runs: list[Callable[[], object]] = [lambda: load(source), lambda: convert(source, tmp_path / "out")]
    for run in runs:
        with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*run git lfs pull"):
            run()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_for_a_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / name).write_bytes(POINTER)
    with pytest.raises(TokenizerError, match=f"{name} is a git-lfs pointer.*run git lfs pull"):
        load_tokenizer(source)
    notes = convert(source, tmp_path / "out").notes
    assert "git-lfs pointer" in notes[0]


def test_a_configuration_with_a_byte_order_mark_works(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    for encoding in ("utf-8-sig", "utf-16"):
        (source / "config.json").write_bytes(json.dumps(CONFIG).encode(encoding))
        with load(source) as model:
            assert model.config.hidden_size == CONFIG["hidden_size"]
        convert(source, tmp_path / encoding)
        assert (
            json.loads((tmp_path / encoding / "config.json").read_text("utf-8"))["hidden_size"] == CONFIG["hidden_size"]
        )
