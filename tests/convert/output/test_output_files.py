"""The files of a conversion: shards without holes, aligned, hashed; configuration, manifest and copies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_mixtral import QuantizationSpec
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.output.plan import make_plan
from tests.convert.support import CONFIG, hashes, make_checkpoint, read_output

MIXTRAL_8X7B = CONFIG | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}


def test_one_shard_a_layer_and_one_for_the_rest(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{n:05}-of-00007.safetensors" for n in range(1, 8)]
    for name, file in index["weight_map"].items():
        parts = name.split(".")
        expected = int(parts[2]) + 1 if parts[1] == "layers" else 7
        assert file == f"model-{expected:05}-of-00007.safetensors"
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in read_output(tmp_path / "out").values())


def test_the_safetensors_package_opens_every_shard(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out", recipe=Recipe(3, 32))
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:  # refuses holes, overlaps and data that is too long
            assert file.metadata() == {"format": "mlx"}
            assert list(file.keys())


@settings(max_examples=60, deadline=None)
@given(
    hidden=st.sampled_from([128, 256, 384]),
    width=st.sampled_from([128, 256, 640]),
    experts=st.integers(1, 5),
    vocab=st.integers(1, 300),
    bits=st.sampled_from([None, 1, 2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
)
def test_a_plan_has_no_holes_and_aligned_tensors(
    hidden: int, width: int, experts: int, vocab: int, bits: int | None, group: int, dtype: str
) -> None:
    config = MixtralConfig.from_hf(
        CONFIG
        | {
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_local_experts": experts,
            "num_experts_per_tok": 1,
            "vocab_size": vocab,
        }
    )
    plan = make_plan(config, Recipe(bits, group).assign(config), dtype)
    for shard in plan.shards:
        end = len(shard.header)
        assert end % 16384 == 0
        for tensor in shard.tensors.values():
            assert tensor.offset == end
            assert tensor.offset % 16384 == 0 or tensor.offset % (tensor.nbytes & -tensor.nbytes) == 0
            end += tensor.nbytes
        assert end == shard.nbytes
    assert sum(size for _, _, size in plan.parts()) == plan.data_bytes


@pytest.mark.parametrize("recipe", [Recipe(4, 64), Recipe(3, 32), Recipe(mode="mxfp4"), Recipe(None)])
def test_large_tensors_of_the_real_model_start_on_a_page(recipe: Recipe) -> None:
    config = MixtralConfig.from_hf(MIXTRAL_8X7B)
    plan = make_plan(config, recipe.assign(config), "BF16")
    small = 0
    for shard in plan.shards:
        for tensor in shard.tensors.values():
            if tensor.nbytes >= 16384:
                assert tensor.offset % 16384 == 0, tensor.name
            else:
                small += 1
    assert small == 65  # the norms: 8 KiB each


def test_the_plan_of_8x7b_weighs_what_the_arithmetic_says() -> None:
    config = MixtralConfig.from_hf(MIXTRAL_8X7B)
    plan = make_plan(config, Recipe(4, 64).assign(config), "BF16")
    assert plan.parameters == 46_702_792_704
    assert plan.data_bytes == pytest.approx(26.3e9, rel=0.002)


def test_config_keeps_the_sources_entries_and_names_the_packing(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", _name_or_path="somewhere/private", custom_note="kept")
    recipe = Recipe(4, 64, overrides={"*.self_attn.*": {"bits": 8}, "lm_head": False})
    convert(source, tmp_path / "out", recipe=recipe)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["model_type"] == "mixtral"
    assert entries["custom_note"] == "kept"
    assert "_name_or_path" not in entries
    quantization = entries["quantization"]
    assert quantization == entries["quantization_config"]
    assert (quantization["bits"], quantization["group_size"], quantization["mode"]) == (4, 64, "affine")
    assert quantization["lm_head"] is False
    assert quantization["model.layers.1.block_sparse_moe.gate"] is False
    assert quantization["model.layers.0.self_attn.k_proj"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert len(quantization) == 3 + 1 + 2 + 8
    parsed = MixtralConfig.from_folder(tmp_path / "out").quantization
    assert parsed is not None
    assert parsed.default == QuantizationSpec(4, 64)


def test_a_newer_spelling_of_rope_theta_reaches_readers_of_the_older(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out", recipe=Recipe(None))
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["rope_theta"] == entries["rope_parameters"]["rope_theta"] == 1e6
    assert "quantization" not in entries
    assert entries["dtype"] == "bfloat16"
    assert "torch_dtype" not in entries


def test_only_overrides_quantised_still_gives_a_default_entry(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "out", recipe=Recipe(None, overrides={"*.switch_mlp.*": {"bits": 3, "group_size": 32}}))
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (3, 32)
    assert quantization["model.embed_tokens"] is False
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj" not in quantization


def test_small_files_are_copied_and_links_become_files(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "blob").write_bytes(b"pieces")
    (source / "tokenizer.model").symlink_to(tmp_path / "blob")
    copied = {"tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    copied |= {"added_tokens.json", "chat_template.jinja", "LICENSE.txt"}
    for name in copied:
        (source / name).write_text(f"contents of {name}")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    (source / "README.md").write_text("not copied")
    (source / "training_args.bin").write_text("not copied")
    convert(source, tmp_path / "out")
    out = tmp_path / "out"
    assert not (out / "tokenizer.model").is_symlink()
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    for name in copied:
        assert (out / name).read_text() == f"contents of {name}"
    assert not (out / "README.md").exists()
    assert not (out / "training_args.bin").exists()


def test_the_manifest_lists_every_file_by_hash_and_no_path_of_this_machine(tiny: Path, tmp_path: Path) -> None:
    report = convert(tiny, tmp_path / "out", recipe=Recipe(4, 64))
    text = (tmp_path / "out" / "conversion.json").read_text()
    manifest = json.loads(text)
    found = hashes(tmp_path / "out")
    del found["conversion.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (tmp_path / "out" / name).stat().st_size
    assert str(tmp_path) not in text
    assert str(tiny.parent) not in text
    assert manifest["source"] == {
        "name": "tiny-mixtral",
        "revision": None,
        "files": {
            "model.safetensors": {
                "bytes": (tiny / "model.safetensors").stat().st_size,
                "fingerprint": manifest["source"]["files"]["model.safetensors"]["fingerprint"],
            }
        },
    }
    assert Recipe.from_dict(manifest["recipe"]) == Recipe(4, 64)
    assert manifest["dtype"] == report.dtype
    assert set(manifest["errors"]) == {
        name.removesuffix(".scales") for name in read_output(tmp_path / "out") if name.endswith(".scales")
    }


def test_headers_are_readable_by_the_runtime_and_permissions_are_ordinary(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source"), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()
        if path.suffix == ".safetensors":
            assert min(info.offset for info in read_header(path).values()) % 16384 == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
