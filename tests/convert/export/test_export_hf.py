"""Export to a Hugging Face folder: the hub's names, the source's bytes, and a folder that appears complete or not at all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_mixtral import load
from mlx_mixtral.errors import (
    ConversionError,
    DestinationError,
    DiskSpaceError,
    DtypeRangeError,
    InvalidRequestError,
    NonFiniteWeightsError,
)
from mlx_mixtral.weights.manifest import check_files
from mlx_mixtral_convert import Progress, Recipe, convert
from mlx_mixtral_convert.export import export
from tests.convert.support import (
    CONFIG,
    EXPERT,
    Tensors,
    dense_config,
    hashes,
    load_arrays,
    make_checkpoint,
    read_output,
    weights,
)


def as_bytes(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def assert_same(first: dict[str, mx.array], second: dict[str, mx.array]) -> None:
    assert sorted(first) == sorted(second)
    for name, array in first.items():
        assert (array.dtype, array.shape) == (second[name].dtype, second[name].shape), name
        assert as_bytes(array) == as_bytes(second[name]), name


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_the_bundled_checkpoint_comes_back_byte_for_byte(tiny: Path, tmp_path: Path) -> None:
    report = export(tiny, tmp_path / "out", to="hf")
    assert_same(read_output(tmp_path / "out"), load_arrays(tiny / "model.safetensors"))
    assert (report.format, report.type, report.bits_per_weight, report.packed_matrices) == ("hf", "BF16", 16.0, 0)
    assert report.output_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # The source has the newer spelling alone; older releases of transformers read the other.
    assert config_of(tmp_path / "out")["rope_theta"] == 1e6
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_unquantised_mlx_and_back_is_the_source(layout: str, dtype: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", layout=layout, dtype=dtype)
    convert(source, tmp_path / "mlx", recipe=Recipe(None))
    export(tmp_path / "mlx", tmp_path / "out", to="hf")
    original = make_checkpoint(tmp_path / "original", dtype=dtype)
    assert_same(read_output(tmp_path / "out"), load_arrays(original / "model.safetensors"))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantised_mlx_becomes_what_mlx_unpacks(bits: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "mlx", recipe=Recipe(bits, 32))
    report = export(tmp_path / "mlx", tmp_path / "out", to="hf")
    assert report.type == "BF16"
    assert report.packed_matrices == 2 + 2 * 7  # not the two routers
    packed, found = read_output(tmp_path / "mlx"), read_output(tmp_path / "out")

    def unpacked(path: str) -> mx.array:
        words, scales, biases = (packed[f"{path}.{field}"] for field in ("weight", "scales", "biases"))
        wide = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
        return wide.astype(mx.bfloat16)

    switch = "model.layers.1.block_sparse_moe.switch_mlp"
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stacked = unpacked(f"{switch}.{ours}_proj")
        for expert in range(4):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{theirs}.weight"
            assert as_bytes(found[name]) == as_bytes(stacked[expert])
    assert as_bytes(found["lm_head.weight"]) == as_bytes(unpacked("lm_head"))
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert as_bytes(found[router]) == as_bytes(packed[router])


def test_config_says_what_transformers_needs_and_nothing_of_packing(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "source", architectures=["Other"], _name_or_path="somewhere/private", note="kept"
    )
    convert(source, tmp_path / "mlx", recipe=Recipe(4, 64))
    assert "quantization" in config_of(tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "out", to="hf", type="F16")
    written = config_of(tmp_path / "out")
    assert not {"quantization", "quantization_config", "_name_or_path"} & set(written)
    assert written["architectures"] == ["MixtralForCausalLM"]
    assert (written["model_type"], written["torch_dtype"], written["note"]) == ("mixtral", "float16", "kept")
    assert written["rope_theta"] == 1e6
    export(source, tmp_path / "direct", to="hf")
    assert "_name_or_path" not in config_of(tmp_path / "direct")


def test_a_quantised_float16_folder_unpacks_to_float16(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source", dtype="F16"), tmp_path / "mlx", recipe=Recipe(4, 64))
    assert export(tmp_path / "mlx", tmp_path / "out", to="hf").type == "F16"
    assert {array.dtype for array in read_output(tmp_path / "out").values()} == {mx.float16}


def test_one_shard_a_layer_that_the_safetensors_package_opens(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", to="hf")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{n:05}-of-00007.safetensors" for n in range(1, 8)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else 7
        assert file == f"model-{layer:05}-of-00007.safetensors"
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in read_output(tmp_path / "out").values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:  # refuses holes and overlaps
            assert file.metadata() == {"format": "pt"}
            assert path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") - 1] in b" }"


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_dense_model_keeps_its_names(kind: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **dense_config(kind))
    export(source, tmp_path / "out", to="hf")
    assert_same(read_output(tmp_path / "out"), load_arrays(source / "model.safetensors"))
    expected = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}[kind]
    assert config_of(tmp_path / "out")["architectures"] == [expected]


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    source = make_checkpoint(tmp_path / "source", edit=drop, tie_word_embeddings=True)
    export(source, tmp_path / "out", to="hf")
    assert sorted(read_output(tmp_path / "out")) == sorted(set(weights(CONFIG)) - {"lm_head.weight"})


def test_the_runtime_computes_the_same_from_it(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "mlx", recipe=Recipe(None))
    export(tmp_path / "mlx", tmp_path / "out", to="hf")
    ids = [1, 5, 9, 200, 3000]
    with load(tiny) as first, load(tmp_path / "out") as second:
        assert np.array_equal(*(np.asarray(m.logits(ids).astype(mx.float32)) for m in (first, second)))


def test_the_manifest_lists_every_file_and_lets_overwrite_replace_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    export(source, tmp_path / "out", to="hf")
    check_files(tmp_path / "out")
    first = hashes(tmp_path / "out")
    text = (tmp_path / "out" / "conversion.json").read_text()
    assert set(json.loads(text)["files"]) == set(first) - {"conversion.json"}
    assert str(tmp_path) not in text
    with pytest.raises(DestinationError, match="--overwrite"):
        export(source, tmp_path / "out", to="hf")
    export(source, tmp_path / "out", to="hf", overwrite=True)
    assert hashes(tmp_path / "out") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_leftovers_of_a_killed_export_do_not_reach_the_result(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    left = tmp_path / ".out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "model-00009-of-00009.safetensors").write_bytes(b"old")
    export(source, tmp_path / "out", to="hf")
    assert not (tmp_path / "out" / "folder").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_an_unfinished_conversion_is_not_thrown_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "journal.jsonl").write_text("{}\n")
    with pytest.raises(DestinationError, match="unfinished conversion to MLX"):
        export(make_checkpoint(tmp_path / "source"), tmp_path / "out", to="hf")
    assert (left / "journal.jsonl").read_text() == "{}\n"


def test_cancelled_halfway_leaves_nothing(tmp_path: Path) -> None:
    asked = iter([False] * 9)
    with pytest.raises(ConversionError, match="export cancelled"):
        export(
            make_checkpoint(tmp_path / "source"),
            tmp_path / "deep" / "out",
            to="hf",
            cancelled=lambda: next(asked, True),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_ends_at_the_sources_bytes(tmp_path: Path) -> None:
    source, seen = make_checkpoint(tmp_path / "source"), list[Progress]()
    export(source, tmp_path / "out", to="hf", progress=seen.append)
    total = sum(2 * value.size for name, value in weights(CONFIG).items() if "norm" not in name)
    assert [at.stage for at in seen] == ["convert"] * (len(seen) - 1) + ["finish"]
    assert seen[-2].done_bytes == seen[-2].total_bytes == total
    assert all(a.done_bytes < b.done_bytes for a, b in itertools.pairwise(seen[:-1]))


def test_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    planned = export(source, tmp_path / "out", to="hf", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert planned.dry_run
    done = export(source, tmp_path / "out", to="hf")
    assert planned.output_bytes == done.output_bytes


def test_weights_that_do_not_fit_or_are_damaged_are_named(tmp_path: Path) -> None:
    def huge(tensors: Tensors) -> None:
        tensors[EXPERT][3, 5] = 70000.0

    def broken(tensors: Tensors) -> None:
        tensors[EXPERT][3, 5] = np.nan

    source = make_checkpoint(tmp_path / "source", edit=huge)
    with pytest.raises(DtypeRangeError, match=r"experts\.2\.w2.*65504"):
        export(source, tmp_path / "out", to="hf", type="F16")
    export(source, tmp_path / "fits", to="hf", type="BF16")
    with pytest.raises(NonFiniteWeightsError, match=r"experts\.2\.w2"):
        export(make_checkpoint(tmp_path / "bad", edit=broken), tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_requests_that_make_no_sense_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(InvalidRequestError, match="export to 'onnx' is unknown; use hf or gguf"):
        export(source, tmp_path / "out", to="onnx")
    with pytest.raises(InvalidRequestError, match="type 'Q4_0' is unknown for hf; use BF16, F16, F32"):
        export(source, tmp_path / "out", to="hf", type="Q4_0")
    with pytest.raises(InvalidRequestError, match="is a file; revision"):
        export(source / "model.safetensors", tmp_path / "out", to="hf", revision="main")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DestinationError, match=r"letter\.txt"):
        export(source, tmp_path / "mine", to="hf", overwrite=True)
    with pytest.raises(DestinationError, match="inside the source"):
        export(source, source / "out", to="hf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(DiskSpaceError, match="needs"):
        export(source, tmp_path / "out", to="hf")
