"""Mistral's own files give the model that the hub's files of the same weights give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral import load
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import detect, open_source
from tests.convert.native_writer import make_native, native, params
from tests.convert.support import CONFIG, Floats, dense_config, make_checkpoint, read_output, save, weights
from tests.convert.torch_writer import save_torch

DENSE = CONFIG | dense_config()
LAYOUTS = [
    pytest.param("consolidated.safetensors", 1, False, id="safetensors"),
    pytest.param("consolidated-{}-of-03.safetensors", 3, False, id="safetensors-split"),
    pytest.param("consolidated.{}.pth", 1, False, id="pth"),
    pytest.param("consolidated.{}.pt", 8, True, id="pt-stacked"),
]


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert mx.array_equal(left[name], right[name]), name


@pytest.mark.parametrize(("file", "count", "stacked"), LAYOUTS)
@pytest.mark.parametrize("bits", [4, None])
def test_the_tensors_are_those_of_the_hub_layout(
    tmp_path: Path, file: str, count: int, stacked: bool, bits: int | None
) -> None:
    convert(make_checkpoint(tmp_path / "reference"), tmp_path / "a", recipe=Recipe(bits))
    source = make_native(tmp_path / "source", native(weights(CONFIG), CONFIG, stacked=stacked), CONFIG, file, count)
    assert detect(source) == "native"
    report = convert(source, tmp_path / "b", recipe=Recipe(bits))
    assert report.dtype == "bfloat16"
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))
    assert (tmp_path / "b" / "tokenizer.model.v3").read_bytes() == b"pieces"
    assert not (tmp_path / "b" / "params.json").exists()


@pytest.mark.parametrize("file", ["consolidated.safetensors", "consolidated.{}.pth"])
def test_a_dense_model_is_the_case_of_one_expert(tmp_path: Path, file: str) -> None:
    convert(make_checkpoint(tmp_path / "reference", **dense_config()), tmp_path / "a")
    convert(make_native(tmp_path / "source", native(weights(DENSE), DENSE), DENSE, file), tmp_path / "b")
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_the_configuration_written_means_the_same_model(tmp_path: Path, config: dict[str, Any], stacked: bool) -> None:
    """Weights equal bit for bit; here everything else that decides the logits, through mlx-lm and this runtime."""
    # mlx-lm ties the embeddings of a dense model that does not say.
    reference = make_checkpoint(tmp_path / "reference", **config, tie_word_embeddings=False)
    source = make_native(
        tmp_path / "source", native(weights(config), config, stacked=stacked), config, "consolidated.{}.pth"
    )
    convert(source, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == config["architectures"]
    assert written["rope_theta"] == 1e6
    assert written["sliding_window"] is None
    assert MixtralConfig.from_hf(written) == MixtralConfig.from_hf(
        config | {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768}
    )
    tokens = np.array([[1, 5, 9, 33, 2, 60]])
    theirs = load_model(reference)[0]
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(
        np.array(load_model(tmp_path / "out")[0](mx.array(tokens))), np.array(theirs(mx.array(tokens))), atol=1e-5
    )


def test_the_params_of_the_stacked_release_are_read(tmp_path: Path) -> None:
    """It has the hub's names, and writes its window as text."""
    source = make_native(
        tmp_path / "source", native(weights(CONFIG), CONFIG, stacked=True), CONFIG, "consolidated.{}.pt", 8
    )
    newer = {key: CONFIG[key] for key in CONFIG if key not in ("model_type", "architectures", "rope_theta")}
    (source / "params.json").write_text(json.dumps(newer | {"sliding_window": "4096"}))
    convert(source, tmp_path / "out")
    read = MixtralConfig.from_folder(tmp_path / "out")
    assert (read.architecture, read.sliding_window, read.rope.theta) == ("mixtral", 4096, 1e6)
    (source / "params.json").write_text(json.dumps(newer | {"sliding_window": "wide"}))
    with pytest.raises(ConfigError, match="sliding_window is 'wide', not a number"):
        convert(source, tmp_path / "other")


def test_without_params_the_hub_configuration_is_used(tmp_path: Path) -> None:
    source = make_native(tmp_path / "source", native(weights(CONFIG), CONFIG), CONFIG, "consolidated.safetensors")
    (source / "params.json").unlink()
    (source / "config.json").write_text(json.dumps(CONFIG))
    assert detect(source) == "native"
    convert(source, tmp_path / "a")
    convert(make_checkpoint(tmp_path / "reference"), tmp_path / "b")
    same(read_output(tmp_path / "a"), read_output(tmp_path / "b"))


def test_hub_files_are_preferred_where_both_lie_in_a_folder(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "params.json").write_text(json.dumps(params(CONFIG)))
    (source / "consolidated.safetensors").write_bytes(b"never opened")
    assert detect(source) == "hf"
    save(source / "consolidated.safetensors", native(weights(CONFIG, seed=1), CONFIG))
    with open_source(source, "native") as opened:
        assert [path.name for path in opened.files.paths] == ["consolidated.safetensors"]


def test_what_several_files_hold_alike_is_taken_once(tmp_path: Path) -> None:
    tensors = native(weights(CONFIG), CONFIG, stacked=True)
    source = make_native(tmp_path / "source", tensors, CONFIG, "consolidated.{}.pt", 2)
    shared = {"norm.weight": tensors["norm.weight"], "rope.freqs": np.ones(16, np.float32)}
    save_torch(source / "consolidated.02.pt", shared)
    convert(source, tmp_path / "out")
    # A part of each tensor in each file, as another family has it, is not the same twice.
    first = np.ones((64, 128), np.float32)
    save_torch(source / "consolidated.02.pt", {"layers.0.attention.wo.weight": first})
    refused(source, r"consolidated\.02\.pt: tensor 'layers\.0\.attention\.wo\.weight' has shape \[64, 128\], in conso")


def refused(source: Path, match: str) -> None:
    target = source.parent / "refused"
    with pytest.raises(CheckpointError, match=match):
        convert(source, target)
    assert not target.exists()


def edited(folder: Path, changes: dict[str, Floats | None], *, stacked: bool = False) -> Path:
    tensors = native(weights(CONFIG), CONFIG, stacked=stacked) | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    return make_native(folder, kept, CONFIG, "consolidated.{}.pt" if stacked else "consolidated.safetensors")


def test_messages_use_the_names_of_the_files(tmp_path: Path) -> None:
    small = np.ones((2, 128), np.float32)
    expert = "layers.1.feed_forward.experts.2.w2.weight"
    refused(
        edited(tmp_path / "a", {"layers.0.attention.wo.weight": None}), r"'layers\.0\.attention\.wo\.weight' is missing"
    )
    refused(edited(tmp_path / "b", {expert: None}), f"'{expert}' is missing")
    refused(edited(tmp_path / "c", {"layers.1.ffn_norm.weight": None}), r"'layers\.1\.ffn_norm\.weight' is missing")
    refused(edited(tmp_path / "d", {"vision_encoder.weight": small}), "'vision_encoder.weight' has no place")
    refused(
        edited(tmp_path / "e", {"layers.7.attention.wo.weight": small}), r"'layers\.7\.attention\.wo\.weight' has no"
    )
    refused(
        edited(tmp_path / "f", {"layers.0.block_sparse_moe.w2": small}, stacked=True),
        r"'layers\.0\.block_sparse_moe\.w2' has shape \[2, 128\]; the configuration calls for \[1024, 128\]",
    )
    refused(
        edited(tmp_path / "g", {"layers.0.block_sparse_moe.w3": None}, stacked=True), r"'layers\.0\.\S+' is missing"
    )
    nan = np.full((1024, 128), np.nan, np.float32)
    refused(
        edited(tmp_path / "h", {"layers.0.block_sparse_moe.w2": nan}, stacked=True),
        r"'layers\.0\.block_sparse_moe\.w2\[0\]' holds NaN",
    )


def test_a_file_of_another_model_under_this_name_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    save(tmp_path / "source" / "consolidated.safetensors", weights(CONFIG))
    assert detect(tmp_path / "source") == "hf"
    convert(tmp_path / "source", tmp_path / "out")


def test_this_runtime_loads_the_result(tmp_path: Path) -> None:
    source = make_native(tmp_path / "source", native(weights(CONFIG), CONFIG), CONFIG, "consolidated.safetensors")
    (source / "tokenizer.model.v3").unlink()
    convert(source, tmp_path / "out")
    with load(tmp_path / "out") as model:
        assert model.config.num_local_experts == 4
