"""GGUF in, MLX out: the same model as the hub's checkpoint of what the package's own dequantisers say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral.reading import read_json
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import detect, open_source
from mlx_mixtral_convert.sources.gguf.types import TYPES
from tests.convert.gguf_writer import HALVES, dequantized, hub_tensors, random_blocks, renamed, write_gguf
from tests.convert.support import CONFIG, dense_config, hashes, load_arrays, make_checkpoint, read_output, save, weights

WIDE = {"hidden_size": 256, "intermediate_size": 512}
TOKENS = [[1, 5, 9, 33, 2, 60]]


def logits(folder: Path) -> Any:
    network, _ = load_model(folder)
    network.set_dtype(mx.float32)
    return np.array(network(mx.array(TOKENS)))


def oracle(folder: Path, config: dict[str, Any], meant: Any) -> Path:
    """A hub folder of the values a GGUF holds."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", hub_tensors(meant, config), "F32")
    return folder


def same_logits(path: Path, config: dict[str, Any], meant: Any, **options: Any) -> None:
    out, by_hand = path.parent / "out", oracle(path.parent / "oracle", config, meant)
    convert(path, out, recipe=Recipe(bits=None), dtype="float32", **options)
    np.testing.assert_allclose(logits(out), logits(by_hand), rtol=1e-5, atol=1e-6)


def test_the_table_of_types_is_the_package_s() -> None:
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (kind.name, kind.weights, kind.nbytes) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])
    readable = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert {kind.name for kind in TYPES.values()} == readable


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_the_model_they_came_from(tmp_path: Path, kind: str, merged: bool) -> None:
    meant = write_gguf(tmp_path / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG, merged=merged), kind)
    same_logits(tmp_path / "m.gguf", CONFIG, meant)
    if kind != "F16":
        original = make_checkpoint(tmp_path / "hub", dtype="F32")
        np.testing.assert_allclose(logits(tmp_path / "out"), logits(original), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0", "TQ1_0", *HALVES])
def test_every_type_is_dequantised_as_the_package_does(tmp_path: Path, kind: str) -> None:
    config = CONFIG | WIDE | {"num_hidden_layers": 1}
    meant = write_gguf(tmp_path / "m.gguf", config, renamed(weights(config), config), kind)
    same_logits(tmp_path / "m.gguf", config, meant)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_models_are_the_one_expert_case(tmp_path: Path, kind: str, tied: bool) -> None:
    config = CONFIG | dense_config(kind) | {"tie_word_embeddings": tied, "rope_theta": 12345.0}
    made = weights(config)
    if tied:
        del made["lm_head.weight"]
    meant = write_gguf(tmp_path / "m.gguf", config, renamed(made, config), "Q8_0")
    same_logits(tmp_path / "m.gguf", config, meant)
    written = read_json(tmp_path / "out" / "config.json")
    assert written["model_type"] == "llama"
    assert written["rope_theta"] == 12345.0
    assert written["tie_word_embeddings"] is tied


def test_the_bundled_checkpoint_goes_through_gguf_unchanged(tiny: Path, tmp_path: Path) -> None:
    config = read_json(tiny / "config.json")
    held = {name: np.array(value.astype(mx.float32)) for name, value in load_arrays(tiny / "model.safetensors").items()}
    write_gguf(tmp_path / "m.gguf", config, renamed(held, config), "BF16")
    convert(tmp_path / "m.gguf", tmp_path / "a", dtype="bfloat16")
    convert(tiny, tmp_path / "b")
    a, b = read_output(tmp_path / "a"), read_output(tmp_path / "b")
    assert sorted(a) == sorted(b)
    for name, value in b.items():
        assert mx.array_equal(a[name], value), name


def split(tmp_path: Path, most: int = 7) -> tuple[Path, Any]:
    folder = tmp_path / "split"
    folder.mkdir()
    meant = write_gguf(folder / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "Q8_0", split_tensors=most)
    assert len(list(folder.iterdir())) > 2
    return folder, meant


def test_a_split_set_is_found_by_its_folder_or_any_of_its_files(tmp_path: Path) -> None:
    folder, meant = split(tmp_path)
    files = sorted(folder.iterdir())
    same_logits(folder, CONFIG, meant)
    for number, source in enumerate((files[0], files[2])):
        convert(source, tmp_path / str(number), recipe=Recipe(bits=None), dtype="float32")
        mine, theirs = hashes(tmp_path / str(number)), hashes(tmp_path / "out")
        assert {k: v for k, v in mine.items() if k != "conversion.json"} == {
            k: v for k, v in theirs.items() if k != "conversion.json"
        }


def test_content_decides_and_the_kind_can_be_forced(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG))
    shutil.move(tmp_path / "m.gguf", tmp_path / "model.bin")
    assert detect(tmp_path / "model.bin") == "gguf"
    with open_source(tmp_path / "model.bin", "gguf") as source:
        assert source.config.num_local_experts == 4
    folder = make_checkpoint(tmp_path / "hub")
    (folder / "beside.gguf").write_bytes((tmp_path / "model.bin").read_bytes())
    assert detect(folder) == "hf"
    with open_source(folder, "gguf") as source:
        assert source.config.vocab_size == 64


def test_reading_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "Q5_1")
    for name in ("a", "b"):
        convert(tmp_path / "m.gguf", tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_reported_errors_are_those_against_the_dequantised_weights(tmp_path: Path) -> None:
    meant = write_gguf(tmp_path / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "Q4_0")
    convert(tmp_path / "m.gguf", tmp_path / "out", recipe=Recipe(3, 32))
    out, path = read_output(tmp_path / "out"), "model.layers.1.self_attn.k_proj"
    fields = [out[f"{path}.{field}"] for field in ("weight", "scales", "biases")]
    found = np.array(mx.dequantize(fields[0], *(f.astype(mx.float32) for f in fields[1:]), group_size=32, bits=3))
    true = hub_tensors(meant, CONFIG)[f"{path}.weight"]
    reported = read_json(tmp_path / "out" / "conversion.json")["errors"][path]
    assert reported["relative_rms"] == pytest.approx(np.linalg.norm(found - true) / np.linalg.norm(true), rel=1e-4)
    assert "packing" not in reported


def test_random_blocks_of_every_type_are_dequantised_bit_for_bit() -> None:
    from mlx_mixtral_convert.sources.gguf.types import dequantize

    for kind in HALVES:
        blocks = random_blocks(kind, 8, 512)
        out = np.empty((8, 512), np.float32)
        dequantize(blocks, kind, out)
        assert np.array_equal(out, dequantized(blocks, kind)), kind
