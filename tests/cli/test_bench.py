"""``mlx-mixtral bench``: what it measures, what it refuses before measuring, and what it leaves when it is interrupted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import load
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.cli.bench.tables import print_bench
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.info.estimate import BUILT_IN
from mlx_mixtral.info.macs import measured_on_similar, published_for
from mlx_mixtral.machine.bandwidth import copy_rates
from mlx_mixtral.machine.device import Device
from mlx_mixtral_convert import Recipe, convert
from tests.shared import SharedFolders

from .conftest import Invoke, assert_one_error

NORM = b"model.norm.weight"
SHORT = ("--tokens", 2, "--repeats", 2, "--prompt", "3,5", "--depth", "4", "--batch", "2")


@pytest.fixture(scope="module", autouse=True)
def _small_copies() -> Iterator[None]:
    """Half a gigabyte is written before copying is measured, which takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_mixtral.bench.run.copy_rates", lambda repeats: copy_rates(2**22, repeats))
        yield


@pytest.fixture
def small_context(two_layers: Path, tmp_path: Path) -> Path:
    """A model whose context is 48 tokens."""
    folder = Path(shutil.copytree(two_layers, tmp_path / "small" / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 48}))
    return folder


@pytest.fixture(scope="module")
def two_layers(shared: SharedFolders, short: Path) -> Path:
    """mlx-lm in 16 bits is slow on the CPU backend."""
    return shared("two layers in 4 bits", lambda folder: convert(short, folder, recipe=Recipe(4)))


@pytest.fixture(scope="module")
def found(two_layers: Path) -> dict[str, Any]:
    from click.testing import CliRunner

    from mlx_mixtral.cli.app import app

    arguments = ["bench", str(two_layers), *map(str, SHORT), "--compare", "mlx-lm", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_every_case_is_measured_on_all_sides(found: dict[str, Any]) -> None:
    assert found["complete"]
    assert [row["prompt_tokens"] for row in found["prefill"]] == [3, 5]
    assert [row["depth_tokens"] for row in found["decode"]] == [4]
    assert [row["rows"] for row in found["batch"]] == [2]
    for row in (*found["prefill"], *found["decode"], *found["batch"]):
        assert set(row["sides"]) == {"mlx-mixtral", "mlx-lm", "mlx-lm float32"}
        for side in row["sides"].values():
            assert 0 < side["tok_s"]["min"] <= side["tok_s"]["median"] <= side["tok_s"]["max"]
        ours = row["sides"]["mlx-mixtral"]["tok_s"]["median"]
        for name, ratio in row["ratios"].items():
            assert ratio == pytest.approx(ours / row["sides"][name]["tok_s"]["median"])
    for row in found["prefill"]:
        # Of two measurements the medians are means: rate and time are of the same measurements.
        side = row["sides"]["mlx-mixtral"]
        assert side["tok_s"]["max"] == pytest.approx(row["prompt_tokens"] / side["time_to_first_token_s"]["min"])
    assert set(found["load"]) == {"mlx-mixtral", "mlx-lm", "mlx-lm float32"}
    assert found["versions"]["mlx-lm"]


def test_bytes_of_a_token_are_what_it_touches(found: dict[str, Any], two_layers: Path) -> None:
    from mlx_mixtral import load

    with load(two_layers) as model:
        module, config = model.module, model.config
        assert module.lm_head is not None
        touched = 0
        for layer in module.layers:
            moe: Any = layer.moe
            banks = sum(array.nbytes for array in moe.experts.bank.arrays.values())
            touched += banks * config.num_experts_per_tok // config.num_local_experts
            parts = (layer.attention, layer.input_norm, layer.post_attention_norm, moe.gate)
            touched += sum(_nbytes(part) for part in parts)
        touched += _nbytes(module.norm) + _nbytes(module.lm_head)
    # Keys and values in float32, of 4 tokens and half of the 2 that are decoded.
    touched += 5 * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row = found["decode"][0]
    assert row["bytes_per_token"] == touched
    rate = row["sides"]["mlx-mixtral"]["tok_s"]["median"]
    assert row["bytes_per_s"] == pytest.approx(touched * rate)
    assert row["share_of_copy"] == pytest.approx(touched * rate / found["copy_bytes_per_s"]["median"])


def _nbytes(module: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def test_tables_show_rates_and_ratios(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    published_here = {"bandwidths": [{"name": "M2 Max", "bandwidth_gb_s": 400, "source": "Apple"}], "decode_8x7b": []}
    print_bench(found | {"published": published_here})
    shown = capsys.readouterr().out
    for part in (
        "Prefill",
        "Decode",
        "Batches",
        "first token",
        "of copy rate",
        "mlx-lm float32",
        "M2 Max: 400 GB/s (Apple)",
    ):
        assert part in shown
    assert f"{found['decode'][0]['ratios']['mlx-lm']:.2f}x" in shown


def test_a_plot_is_written_and_default_lists_are_cut_to_the_context(
    invoke: Invoke, small_context: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "bench.png"
    result = invoke("bench", small_context, "--tokens", 2, "--repeats", 1, "--batch", "none", "--plot", plot, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    # One token is left to generate; decode feeds one more than it times.
    assert [row["prompt_tokens"] for row in found["prefill"]] == [47]
    assert [row["depth_tokens"] for row in found["decode"]] == [45]
    assert found["batch"] == []
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["bench.png"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--repeats", 0), ("repeats is 0", "at least 1")),
        (("--tokens", 0), ("tokens is 0", "at least 1")),
        (("--prompt", "8,0"), ("prompt is 0", "at least 1")),
        (("--depth", "-3"), ("depth is -3", "at least 1")),
        (("--batch", "5000"), ("batch is 5000", "at most 1024")),
        (("--prompt", "48"), ("prompt 48 is too long", "48 tokens", "at most 47")),
        (("--depth", "46", "--tokens", 2), ("depth 46 is too long", "at most 45")),
        (("--prompt", "9", "--context", 9), ("prompt 9 is too long", "holds 9 tokens")),
        (("--tokens", 47), ("tokens is 47", "context holds 48")),
        (("--context", 0), ("context is 0",)),
        (("--context", 49), ("context is 49", "own is 48")),
        (("--plot", ""), ("empty name",)),
        (("--plot", "/nowhere/at/all.png"), ("cannot be written", "no folder /nowhere/at")),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(
    invoke: Invoke,
    small_context: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr("mlx_mixtral.cli.subject.load_model", None)
    assert_one_error(invoke("bench", small_context, *arguments), *parts)


@pytest.mark.parametrize("value", ["", "some", "1;2", "3.5"])
def test_what_is_no_list_of_numbers_is_a_usage_error(invoke: Invoke, small_context: Path, value: str) -> None:
    result = invoke("bench", small_context, "--depth", value)
    assert result.exit_code == 2
    assert "is not a list of numbers" in result.stderr


def test_without_mlx_lm_there_is_nothing_to_compare(
    invoke: Invoke, small_context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.generate", None)
    assert_one_error(invoke("bench", small_context, "--compare", "mlx-lm"), "needs mlx-lm", "pip install mlx-lm")


def test_a_folder_mlx_lm_cannot_load_is_told_before_measuring(
    invoke: Invoke, small_context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.cli.subject.load_model", None)
    _rename_a_tensor(next(path for path in small_context.glob("*.safetensors") if NORM in path.read_bytes()))
    assert_one_error(
        invoke("bench", small_context, "--compare", "mlx-lm"), "mlx-lm cannot load", "leave out the comparison"
    )


def _rename_a_tensor(path: Path) -> None:
    """In place, in the JSON header, one letter: mlx-lm knows no tensor of that name."""
    data = bytearray(path.read_bytes())
    at = data.index(NORM)
    data[at : at + 5] = b"modem"
    path.write_bytes(data)


def test_what_mlx_lm_cannot_compute_is_said_and_ours_goes_on(
    invoke: Invoke, two_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("mlx_mixtral.bench.mlx_lm_backend.MlxLm.prefill", fail)
    only = ("--repeats", 1, "--prompt", 3, "--depth", "none", "--batch", "none")
    result = invoke("bench", two_layers, *only, "--compare", "mlx-lm", "--json")
    assert result.exit_code == 0, result.stderr
    sides = json.loads(result.stdout)["prefill"][0]["sides"]
    assert sides["mlx-lm"] == {"not_measured": "RuntimeError: no such kernel"}
    assert sides["mlx-mixtral"]["tok_s"]["median"] > 0


def test_an_interrupt_shows_what_was_measured(
    invoke: Invoke, two_layers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ours, "decode", interrupt)
    result = invoke("bench", two_layers, *SHORT, "--json", "--plot", tmp_path / "bench.png")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    found = json.loads(result.stdout)
    assert not found["complete"]
    assert (len(found["prefill"]), found["decode"], found["batch"]) == (2, [], [])
    assert not (tmp_path / "bench.png").exists()


def test_a_batch_beyond_the_memory_budget_is_left_out(invoke: Invoke, quantised: Path) -> None:
    with load(quantised, context=35) as model:
        memory = model.min_memory_bytes + 300_000
    result = invoke("bench", quantised, *SHORT, "--batch", "1,2", "--memory", memory, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["batch"][0]["sides"]["mlx-mixtral"]["tok_s"]["median"] > 0
    assert found["batch"][1]["sides"]["mlx-mixtral"] == {
        "not_measured": "the memory budget does not hold that many rows at once"
    }
    # Streamed, with so few slots that a second prompt of the same tokens still finds most of its experts on disk.
    assert found["prefill"][0]["sides"]["mlx-mixtral"]["read_bytes_per_token"] > 0
    assert "read_bytes_per_token" in found["decode"][0]["sides"]["mlx-mixtral"]
    assert found["peak_memory_bytes"] > 0


def _mac(name: str, gib: int = 64) -> Device:
    return Device("metal", name, "applegpu_g14s", gib * 2**30, gib * 2**29)


def test_published_figures_are_of_the_same_class_of_machine() -> None:
    def machines(device: Device) -> set[str]:
        return {entry.machine for entry in measured_on_similar(device)}

    assert machines(_mac("Apple M2 Max")) == {"M2 Max, 38-core GPU", "M1 Max, 24-core GPU"}
    assert machines(_mac("Apple M4 Max")) == {"M2 Max, 38-core GPU", "M1 Max, 24-core GPU"}  # the 410 GB/s kind
    assert machines(_mac("Apple M3 Ultra")) == {"M1 Ultra"}
    assert machines(_mac("Apple M2", 32)) == {"32 GB Mac"}
    assert machines(_mac("Apple M2", 16)) == set()
    assert machines(_mac("Apple M99 Max")) == set()
    assert machines(Device("cuda", "NVIDIA GeForce RTX 3060", "sm_86")) == {"RTX 3060"}
    assert machines(Device("cuda", "NVIDIA H100", "sm_90")) == set()
    assert machines(Device("cpu", "Apple M2 Max", "")) == set()


def test_published_figures_name_their_sources_and_are_of_8x7b_only(tiny: Path) -> None:
    found = published_for(_mac("Apple M2 Max"), BUILT_IN["8x7b"])
    assert [chip["bandwidth_gb_s"] for chip in found["bandwidths"]] == [400]
    assert all(entry["source"] for entry in (*found["bandwidths"], *found["decode_8x7b"]))
    assert {entry["decode_tok_s"] for entry in found["decode_8x7b"]} == {34.7, 28.4, 39.9, 14.5}
    other = published_for(_mac("Apple M2 Max"), MixtralConfig.from_folder(tiny))
    assert (len(other["bandwidths"]), other["decode_8x7b"]) == (1, [])
    here = published_for(Device("cpu", "EPYC", ""), BUILT_IN["8x7b"])
    assert here == {"bandwidths": [], "decode_8x7b": []}
