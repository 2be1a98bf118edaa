"""Every kind of checkpoint straight from a hub that breaks a tenth of all requests: the same bytes as downloaded first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import detect
from tests.convert.gguf_writer import renamed, write_gguf
from tests.convert.hub_server import WEIGHTS, run_all, serve
from tests.convert.module_packers import integers, lookup
from tests.convert.native_writer import make_native, native, params
from tests.convert.packers import awq, fp8, gptq, grouped_packer, make_packed
from tests.convert.support import CONFIG, hashes, make_checkpoint, measured, read_output, weights
from tests.convert.torch_writer import save_torch

# Wide enough for blocks of 256.
GGUF = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
EXACT = {"exact": True}


def fused(folder: Path) -> None:
    make_checkpoint(folder, layout="fused", shards=2)


def of_awq(folder: Path) -> None:
    entry = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    make_packed(folder, entry, grouped_packer(awq, 64), shards=2)


def of_gptq(folder: Path) -> None:
    """In order of importance, and with the biases of zeros that such folders have."""
    pack = grouped_packer(gptq, 64, act_order=True)

    def with_bias(module: str, weight: Any) -> Any:
        fields, meant = pack(module, weight)
        return fields | {"bias": np.zeros(len(weight), np.float16)}, meant

    make_packed(folder, {"quant_method": "gptq", "bits": 4, "group_size": 64}, with_bias, shards=2)


def of_fp8(folder: Path) -> None:
    make_packed(folder, {"quant_method": "compressed-tensors"}, lambda _, weight: fp8(weight, (len(weight), 1)))


def of_compressed(folder: Path) -> None:
    """Zero points, in two files."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    make_packed(folder, entry, lambda _, weight: integers(weight, 4, 32, zeros="packed"), shards=2)


def of_modelopt(folder: Path) -> None:
    """Described in hf_quant_config.json alone."""
    make_packed(folder, {}, lambda _, weight: fp8(weight, ()))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


def of_nf4(folder: Path) -> None:
    """Experts at any byte of a flattened matrix."""
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    kept = ("weight", "weight.absmax", "bitsandbytes__nf4")
    make_packed(folder, entry, lambda _, weight: lookup(weight), plain_bytes=kept, num_hidden_layers=1)


def of_mlx(folder: Path) -> None:
    convert(make_checkpoint(folder.with_name("floats")), folder, recipe=Recipe(4, 64))


def of_native(folder: Path) -> None:
    make_native(folder, native(weights(CONFIG), CONFIG), CONFIG, "consolidated.safetensors")


def of_torch_native(folder: Path) -> None:
    """Stacked experts, w2 transposed, in two files."""
    make_native(folder, native(weights(CONFIG), CONFIG, stacked=True), CONFIG, "consolidated.{}.pt", 2)


def of_torch(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_torch(folder / "pytorch_model.bin", weights(CONFIG))


def of_npz(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(params(CONFIG)))
    arrays = list(native(weights(CONFIG), CONFIG).items())
    for number in range(2):
        np.savez(folder / f"weights.{number}.npz", **dict(arrays[number::2]))


def of_gguf(folder: Path) -> None:
    folder.mkdir()
    (folder / "LICENSE").write_text("of the model")
    write_gguf(folder / "m.gguf", GGUF, renamed(weights(GGUF), GGUF), "Q8_0")


def of_split_gguf(folder: Path) -> None:
    """A set, experts apart, beside another model and a licence that may be the other's."""
    folder.mkdir()
    (folder / "LICENSE").write_text("of either")
    write_gguf(folder / "m.gguf", GGUF, renamed(weights(GGUF), GGUF, merged=False), "Q4_0", split_tensors=9)
    (folder / "other.gguf").write_bytes(b"GGUF" + bytes(200))


KINDS: list[tuple[str, Callable[[Path], None], str, list[dict[str, Any]]]] = [
    ("hf", fused, "", [{}]),
    ("awq", of_awq, "", [{}, EXACT]),
    ("gptq", of_gptq, "", [{}, EXACT]),
    ("compressed-tensors", of_fp8, "", [{}]),
    ("compressed-tensors", of_compressed, "", [{}, EXACT]),
    ("modelopt", of_modelopt, "", [{}]),
    ("bitsandbytes", of_nf4, "", [{}]),
    ("mlx", of_mlx, "", [{"recipe": {"bits": 8, "group_size": 32}}, EXACT]),
    ("native", of_native, "", [{}]),
    ("native", of_torch_native, "", [{}]),
    ("hf-bin", of_torch, "", [{}]),
    ("npz", of_npz, "", [{}]),
    ("gguf", of_gguf, "", [{}, EXACT]),
    ("gguf", of_split_gguf, ":m-00002-of-00003.gguf", [{}, EXACT]),
]


@pytest.mark.parametrize(
    ("kind", "make", "file", "conversions"), KINDS, ids=lambda value: getattr(value, "__name__", "")
)
def test_streamed_it_is_the_same_bytes_as_downloaded(
    tmp_path: Path, kind: str, make: Callable[[Path], None], file: str, conversions: list[dict[str, Any]]
) -> None:
    repository = tmp_path / "repository"
    make(repository)
    assert detect(repository / file.replace(":", "") if file else repository) == kind
    stored = sum(path.stat().st_size for path in repository.iterdir() if path.suffix in WEIGHTS)
    small = sum(path.stat().st_size for path in repository.iterdir() if path.suffix not in WEIGHTS)
    names = [str(number) for number in range(len(conversions))]
    ways = [("streamed", True), ("downloaded", False)]
    with serve(repository) as hub:
        hub.failures = 0.1
        results = run_all(
            tmp_path / "home",
            hub,
            [
                {"dest": tmp_path / way / name, "stream": stream} | options
                for way, stream in ways
                for name, options in zip(names, conversions, strict=True)
            ],
            source=f"owner/model{file}",
        )
    assert not [result for result in results if "error" in result]
    for name, result in zip(names, results, strict=False):
        assert hashes(tmp_path / "streamed" / name) == hashes(tmp_path / "downloaded" / name)
        assert read_output(tmp_path / "streamed" / name)
        assert result["retries"] > 0
        # The cache keeps a few bytes about each file besides.
        assert result["peak"] < small + 10_000 < stored / 10
        print(
            f"{kind}: peak extra disk {result['peak']} bytes of {stored}, {result['retries']} requests made again, "
            f"{result['received']} bytes received"
        )
    assert results[len(names)]["peak"] > stored * 0.9


@pytest.mark.parametrize(("make", "file"), [(of_split_gguf, ":m-00001-of-00005.gguf"), (of_awq, "")])
@pytest.mark.parametrize("large", [True, False])
def test_a_download_goes_on_where_a_stream_was_interrupted(
    tmp_path: Path, make: Callable[[Path], None], file: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the hub knows a weight file's sha256."""
    monkeypatch.setitem(GGUF, "num_hidden_layers", 2)
    make(tmp_path / "repository")
    options = {"dest": tmp_path / "out", "stream": True}
    with serve(tmp_path / "repository") as hub:
        hub.large = large
        both = {"source": f"owner/model{file}"}
        (broken,) = run_all(tmp_path / "home", hub, [options | both], stop_at=25)
        assert broken["notes"] == ["repeat the command to continue from layer 2 of 2"]
        resumed, _ = run_all(
            tmp_path / "home",
            hub,
            [options | both | {"stream": False}, options | both | {"dest": tmp_path / "whole"}],
        )
    assert resumed.get("resumed") == 1, resumed
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_packed_matrix_is_fetched_once_in_an_exact_conversion_too(tmp_path: Path) -> None:
    """Its values, to measure, and its integers, to keep."""
    of_gguf(tmp_path / "repository")
    stored = (tmp_path / "repository" / "m.gguf").stat().st_size
    with serve(tmp_path / "repository") as hub:
        (result,) = run_all(tmp_path / "home", hub, [{"dest": tmp_path / "out", "stream": True, "exact": True}])
    # And a MB from the beginning, where the head is.
    assert 0.9 * stored < result["received"] < stored + 1.1 * 2**20
    assert result["retries"] == 0


def test_parts_of_a_matrix_are_fetched_once(tmp_path: Path) -> None:
    """Decoding reads blocks of rows, a stacked tensor after the other."""
    of_mlx(tmp_path / "repository")
    layer = sorted((tmp_path / "repository").glob("*.safetensors"))[1]
    with serve(tmp_path / "repository") as hub:
        run_all(tmp_path / "home", hub, [{"dest": tmp_path / "out", "stream": True}])
    assert "switch_mlp" in str(layer.read_bytes()[:5000])
    served = sum(count for name, _, count in hub.served if name == layer.name)
    assert 0.9 * layer.stat().st_size < served < 1.1 * layer.stat().st_size + 2**17


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_a_calibration_serves_both_ways_alike(tmp_path: Path, rounding: str) -> None:
    """GPTQ reads every layer twice, the second time through a source of its own."""
    repository = make_checkpoint(tmp_path / "repository", num_hidden_layers=1, intermediate_size=128)
    measured(repository).save(tmp_path / "calibration")
    both = {"calibration": tmp_path / "calibration", "recipe": {"rounding": rounding}}
    with serve(repository) as hub:
        hub.failures = 0.1
        results = run_all(
            tmp_path / "home",
            hub,
            [
                both | {"dest": tmp_path / "streamed", "stream": True},
                both | {"dest": tmp_path / "downloaded", "stream": False},
            ],
        )
    assert not [result for result in results if "error" in result], results
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "downloaded")
    stored = (repository / "model.safetensors").stat().st_size
    assert results[0]["peak"] < stored / 10
    assert results[0]["received"] > stored * (1.8 if rounding == "gptq" else 0.9)
