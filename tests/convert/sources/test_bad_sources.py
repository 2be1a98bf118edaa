"""Sources that must be refused: each error names what is wrong, and nothing is left behind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    MixtralError,
    NonFiniteWeightsError,
    TokenizerError,
)
from mlx_mixtral_convert import Progress, Recipe, convert
from tests.convert.support import EXPERT, Tensors, dense_config, hashes, make_checkpoint, read_output


def refused(source: Path, kind: type[MixtralError], match: str, **options: Any) -> None:
    """The conversion fails with one line, writes nothing, and leaves the source alone."""
    before, around = hashes(source), sorted(source.parent.iterdir())
    with pytest.raises(kind, match=match) as caught:
        convert(source, source.parent / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.iterdir()) == around
    assert hashes(source) == before


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name].flat[5] = value

    return edit


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, None])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, dtype: str, bits: int | None) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=dtype, edit=put(EXPERT, value))
    refused(source, NonFiniteWeightsError, f"tensor '{EXPERT}' holds NaN or infinity", recipe=Recipe(bits))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.block_sparse_moe.gate.weight", "lm_head.weight"])
def test_every_kind_of_tensor_is_searched_for_nan(tmp_path: Path, name: str) -> None:
    refused(make_checkpoint(tmp_path / "source", edit=put(name, np.nan)), NonFiniteWeightsError, f"'{name}'")


def test_a_stacked_tensor_is_named_with_its_expert(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.experts.down_proj"][3, 0, 0] = np.nan

    source = make_checkpoint(tmp_path / "source", layout="fused", edit=edit)
    refused(source, NonFiniteWeightsError, r"'model\.layers\.0\.mlp\.experts\.down_proj\[3\]'")


@pytest.mark.parametrize("bits", [4, None])
def test_values_beyond_float16_are_named(tmp_path: Path, bits: int | None) -> None:
    source = make_checkpoint(tmp_path / "source", edit=put(EXPERT, 70000.0))
    refused(
        source,
        CheckpointError,
        rf"'{EXPERT}' holds 7\.01e\+04, beyond float16's 65504",
        dtype="float16",
        recipe=Recipe(bits),
    )
    convert(source, tmp_path / "out", recipe=Recipe(bits))


def test_weights_whose_scale_overflows_are_named(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[EXPERT][0, :2] = 3.3e38, -3.3e38

    refused(make_checkpoint(tmp_path / "source", edit=edit), ConversionError, f"'{EXPERT}'", recipe=Recipe(2))


def drop(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


@pytest.mark.parametrize(
    "name", [EXPERT, "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    refused(make_checkpoint(tmp_path / "source", edit=drop(name)), CheckpointError, f"tensor '{name}' is missing")


def test_a_layer_without_experts_is_named(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.block_sparse_moe.experts.")]:
            del tensors[name]

    name = r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight"
    refused(make_checkpoint(tmp_path / "source", edit=edit), CheckpointError, f"'{name}' is missing")


def replace(name: str, value: Any) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = value

    return edit


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (EXPERT, np.ones((128, 255), np.float32), r"shape \[128, 255\]; the configuration calls for 256 columns"),
        (EXPERT, np.ones((127, 256), np.float32), r"shape \[127, 256\]; the configuration calls for \[128"),
        (EXPERT, np.ones((128 * 256), np.float32), r"shape \[32768\]"),
        (EXPERT, np.ones((128, 256), np.int64), r"dtype I64; F32, F16, BF16 can be converted"),
        ("model.norm.weight", np.ones(127, np.float32), r"shape \[127\]; the configuration calls for \[128\]"),
        ("model.norm.weight", np.ones(128, np.int64), "dtype I64"),
    ],
)
def test_a_wrong_shape_or_type_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, match: str
) -> None:
    monkeypatch.setattr(os, "pwrite", None)
    source = make_checkpoint(tmp_path / "source", edit=replace(name, value))
    refused(source, CheckpointError, f"tensor '{name}' has {match}")


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight", "score.weight"]
)
def test_a_tensor_the_model_has_no_place_for_is_refused(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", edit=replace(name, np.ones((128, 128), np.float32)))
    refused(source, CheckpointError, f"'{name}' has no place")


def test_derived_and_tied_tensors_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = make_checkpoint(
        tmp_path / "source", tie_word_embeddings=True, edit=replace(name, np.ones(16, np.float32)), **dense_config()
    )
    convert(source, tmp_path / "out")
    assert not {name, "lm_head.weight"} & set(read_output(tmp_path / "out"))


def test_a_shard_the_index_does_not_name_is_ignored(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", shards=2)
    (source / "model-00003-of-00003.safetensors").write_bytes(b"left over from another download")
    convert(source, tmp_path / "out")
    convert(make_checkpoint(tmp_path / "clean", shards=2), tmp_path / "expected")
    found, expected = hashes(tmp_path / "out"), hashes(tmp_path / "expected")
    assert {k: v for k, v in found.items() if k.endswith(".safetensors")} == {
        k: v for k, v in expected.items() if k.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("../model.safetensors", r"placed in '\.\./model\.safetensors', which is not a file of this folder"),
        ("absent.safetensors", r"names 'absent\.safetensors', which is not in"),
        ("model-00001-of-00002.safetensors", "does not have it"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, file: str, match: str) -> None:
    source = make_checkpoint(tmp_path / "source", shards=2)
    index = source / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    name = next(n for n, f in entries["weight_map"].items() if f == "model-00002-of-00002.safetensors")
    entries["weight_map"][name] = file
    index.write_text(json.dumps(entries))
    refused(source, CheckpointError, match)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate((source / "model.safetensors").stat().st_size - 1000)
    refused(source, CheckpointError, "truncated")


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refused(source, CheckpointError, "header claims 1099511627776 bytes")


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, ConversionError, "quantised with hqq"),
        ({"quantization_config": {"bits": 4}}, ConversionError, "quantised with an unnamed method"),
        ({"model_type": "qwen2_moe"}, ConfigError, "'qwen2_moe'"),
        ({"architectures": ["LlamaForCausalLM"]}, ConfigError, 'architectures says "LlamaForCausalLM", model_type'),
        ({"eos_token_id": 64}, ConfigError, "eos_token_id is 64; the vocabulary's ids go from 0 to 63"),
        ({"bos_token_id": 99}, ConfigError, "bos_token_id is 99; the vocabulary's ids go from 0 to 63"),
        ({"num_hidden_layers": 1}, CheckpointError, "has no place"),
        ({"num_local_experts": 3}, CheckpointError, r"gate\.weight' has shape \[4, 128\]"),
    ],
)
def test_other_kinds_of_checkpoint_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[MixtralError], match: str
) -> None:
    source = make_checkpoint(tmp_path / "source")
    entries = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(entries | changes))
    refused(source, kind, match)


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ('{"eos_token_id": [2, 64]}', ConfigError, r"generation_config\.json: eos_token_id is 64; .* from 0 to 63"),
        (
            '{"eos_token_id": "</s>"}',
            ConfigError,
            r"generation_config\.json: eos_token_id holds \"</s>\", not a token id",
        ),
        ("[]", CheckpointError, r"generation_config\.json holds a JSON list"),
        ("{", CheckpointError, r"generation_config\.json is not valid JSON"),
    ],
)
def test_settings_the_result_could_not_be_loaded_with_are_refused(
    tmp_path: Path, text: str, kind: type[MixtralError], match: str
) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "generation_config.json").write_text(text)
    refused(source, kind, match)
    refused(source, kind, match, dry_run=True)


def test_packed_output_without_its_entry_is_refused(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "packed")
    entries = json.loads((tmp_path / "packed" / "config.json").read_text())
    del entries["quantization"], entries["quantization_config"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(entries))
    refused(tmp_path / "packed", ConversionError, r"embed_tokens is quantised already \(it has scales\)")


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    refused(source, CheckpointError, "no config.json; it is empty")
    (source / "notes.txt").write_text("")
    refused(source, CheckpointError, r"no config.json, only notes\.txt")
    (source / "config.json").write_text("{")
    refused(source, CheckpointError, "not valid JSON")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_an_unknown_float_type_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    refused(source, MixtralError, "dtype 'int8' is unknown; use auto, float32", dtype="int8")


@pytest.mark.parametrize("change", ["grow", "touch", "remove"])
def test_a_source_that_changes_meanwhile_is_an_error(tmp_path: Path, change: str) -> None:
    source = make_checkpoint(tmp_path / "source", shards=2)
    file = source / "model-00002-of-00002.safetensors"

    def disturb(progress: Progress) -> None:
        if progress.what != "model.layers.1.self_attn.q_proj" or not file.exists():
            return
        if change == "grow":
            with file.open("ab") as handle:
                handle.write(b"more")
        elif change == "touch":
            os.utime(file, ns=(1, 1))
        else:
            file.unlink()

    words = {"grow": "changed during the conversion", "touch": "it was modified", "remove": "can no longer be read"}
    with pytest.raises(ConversionError, match=words[change]):
        convert(source, tmp_path / "out", progress=disturb)
    # A file that went away may come back, as an unplugged disk does: then the conversion goes on.
    kept = [".out.partial"] if change == "remove" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "source"]


@pytest.mark.parametrize("pieces", [64, 65])
def test_a_tokenizer_with_more_pieces_than_the_model_has_embeddings_is_refused(tmp_path: Path, pieces: int) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(pieces)}}}))
    if pieces == 64:
        convert(source, tmp_path / "out")
        return
    refused(source, TokenizerError, r"tokenizer\.json has 65 pieces, but the model's vocab_size is 64", dry_run=True)


def test_ids_count_and_not_pieces_alone(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 64}}}))
    refused(source, TokenizerError, r"tokenizer\.json has 65 pieces, but the model's vocab_size is 64")


def test_the_sentencepiece_model_has_to_match_too(tiny: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "tokenizer.model.v3").write_bytes((tiny / "tokenizer.model").read_bytes())
    refused(source, TokenizerError, r"tokenizer\.model\.v3 has \d+ pieces, but the model's vocab_size is 64")
