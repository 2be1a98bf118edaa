"""``info``: the published figures of Mixtral, and what a folder's headers say; weights are never read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_mixtral.cli.info.tables import tokens_short
from mlx_mixtral.info.macs import CHIPS, usable_bytes

from .conftest import Invoke, assert_one_error


def json_of(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    result = invoke("info", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def test_8x7b_has_the_published_figures(invoke: Invoke) -> None:
    report = json_of(invoke, "8x7b")
    assert report["parameters"] == 46_702_792_704
    assert report["active_parameters"] == 12_879_925_248
    assert report["kv_cache"]["bytes_per_token"] == 128 * 1024
    widths = {width["bits"]: width for width in report["widths"]}
    assert sorted(widths) == [2, 3, 4, 5, 6, 8, 16]
    assert widths[4]["bytes"] / 1e9 == pytest.approx(26.3, abs=0.05)
    assert widths[4]["expert_bytes"] / 1e6 == pytest.approx(99, abs=0.5)
    assert widths[4]["bytes_per_token"] / 1e9 == pytest.approx(7.2, abs=0.05)
    assert widths[16]["bytes"] == 2 * 46_702_792_704
    for width in widths.values():
        assert sum(width["parts"].values()) == width["bytes"]
        # 32 layers, 8 rows of 4096 numbers in 16 bits: the router is never quantised.
        assert width["parts"]["router"] == 32 * 8 * 4096 * 2


def test_8x22b_has_the_published_figures(invoke: Invoke) -> None:
    report = json_of(invoke, "8X22B")
    assert report["parameters"] == 140_620_634_112
    assert report["active_parameters"] / 1e9 == pytest.approx(39.15, abs=0.01)
    assert report["kv_cache"]["bytes_per_token"] == 224 * 1024
    four = next(width for width in report["widths"] if width["bits"] == 4)
    assert four["bytes"] / 1e9 == pytest.approx(79.1, abs=0.05)
    assert four["bytes_per_token"] / 1e9 == pytest.approx(21.9, abs=0.05)
    assert report["measured"] == []


def test_what_fits_which_mac(invoke: Invoke) -> None:
    fits = {row["memory_gib"]: row["context"] for row in json_of(invoke, "8x7b")["fits"]}
    assert set(fits[16].values()) == {0}
    assert fits[32]["4-bit"] == 0  # 26.3 GB do not fit two thirds of 32 GiB
    assert fits[32]["3-bit"] > 8192
    assert fits[36]["4-bit"] == (27 * 2**30 - 26_272_210_944 - 500_000_000) // (128 * 1024)
    assert fits[48]["4-bit"] == 32768
    assert fits[192]["16-bit"] == 32768
    assert usable_bytes(32) == 32 * 2**30 * 2 // 3
    assert usable_bytes(64) == 48 * 2**30


def test_speed_bounds_are_bandwidth_over_bytes_per_token(invoke: Invoke) -> None:
    report = json_of(invoke, "8x7b")
    assert len(report["speed_bounds"]) == len(CHIPS)
    read = next(width for width in report["widths"] if width["bits"] == 4)["bytes_per_token"]
    one = json_of(invoke, "8x7b", "--chip", "m2 max")["speed_bounds"]
    assert [(row["chip"], row["bandwidth_gb_s"]) for row in one] == [("M2 Max", 400)]
    assert one[0]["tok_s"]["4-bit"] == pytest.approx(400e9 / read)
    # What others measured stays below the bound.
    best = max(m["decode_tok_s"] for m in report["measured"] if m["machine"].startswith("M2 Max"))
    assert best < one[0]["tok_s"]["2-bit"]
    both = json_of(invoke, "8x7b", "--chip", "Apple M3 Max")["speed_bounds"]
    assert [row["bandwidth_gb_s"] for row in both] == [300, 400]
    assert_one_error(invoke("info", "8x7b", "--chip", "M9"), "M9", "M3 Max")
    plan = ("info", "8x7b", "--memory", "12GB")
    wanted = "name 'M3 Max 30-core' (300 GB/s) or 'M3 Max 40-core' (400 GB/s) with --chip"
    assert_one_error(invoke(*plan, "--chip", "M3 Max"), wanted)
    assert invoke(*plan, "--chip", "M3 Max 40-core").exit_code == 0
    assert_one_error(invoke(*plan), "name one with --chip")


def test_recipes_are_for_chips_of_each_mac_or_the_one_named(invoke: Invoke) -> None:
    """24 GB: two thirds of 24 GiB less 4096 x 128 KiB of cache and 500 MB are 16.1 GB, 2.74 bits for each of 46.7e9 weights."""
    rows = {row["memory_gib"]: row for row in json_of(invoke, "8x7b")["recipes"]}
    assert sorted(rows) == [16, 24, 32, 36, 48, 64, 96, 128, 192]
    assert (rows[24]["kind"], rows[24]["convert"], rows[24]["bytes"]) == ("fits", "--fit 16GB", 16_000_000_000)
    assert rows[24]["bits_per_weight"] == pytest.approx(8 * 16e9 / 46_702_792_704)
    assert 0.06185 < rows[24]["expected_kl"] < 0.07267  # those measured at 2.75 and 2.5 bits
    assert list(rows[24]["tok_s"]) == ["M4", "M4 Pro"]
    assert (rows[16]["kind"], rows[16]["memory"], rows[16]["kl_is"]) == ("streamed", "11GB", "about")
    assert (rows[128]["kind"], rows[128]["convert"]) == ("whole", "--bits none")
    named = json_of(invoke, "8x7b", "--chip", "M2 Max")["recipes"]
    assert all(list(row["tok_s"]) == ["M2 Max"] for row in named)
    # Half the bandwidth is half the bound where all fits.
    assert named[1]["tok_s"]["M2 Max"] == pytest.approx(rows[24]["tok_s"]["M4"] * 400 / 120)

    shown = invoke("info", "8x7b", env={"COLUMNS": "80"}).stdout.splitlines()
    (sixteen,) = [line for line in shown if "--fit 13.2GB" in line]
    assert sixteen.split()[:6] == ["16", "GB", "--fit", "13.2GB", "2.26", "0.12"]
    assert sixteen.endswith("*")
    (thirty_six,) = [line for line in shown if "--fit 27GB" in line]
    assert "<0.0054" in thirty_six
    assert "M4 Max 32-core" in thirty_six
    assert "bundled checkpoint of 8.4 million parameters" in " ".join(" ".join(shown).split())
    with_chip = invoke("info", "8x7b", "--chip", "M2 Max", env={"COLUMNS": "80"}).stdout
    assert "M2 Max tok/s" in with_chip


@pytest.mark.parametrize("model", ["8x7b", "8x22b"])
def test_tables_fit_80_columns(invoke: Invoke, model: str) -> None:
    result = invoke("info", model, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    for words in ("Weights", "KV cache", "fits a Mac", "Upper bound", "2/3 of a Mac's memory"):
        assert words in result.stdout
    assert ("llama.cpp #4406" in result.stdout) == (model == "8x7b")


def test_a_converted_folder_shows_its_packing(invoke: Invoke, quantised: Path) -> None:
    report = json_of(invoke, quantised)
    parts = {part["part"]: part for part in report["parts"]}
    assert parts["expert"]["formats"] == ["4-bit g64"]
    assert parts["expert"]["bits_per_weight"] == 4.5
    assert parts["router"]["formats"] == ["bfloat16"]
    assert report["parameters"] == 8_429_184
    assert report["conversion"]["source"]["name"] == "tiny-mixtral"
    assert report["tokenizer"] == {
        "kind": "SentencePiece",
        "vocab_size": 4096,
        "chat_format": "mistral-v1",
        "chat_origin": "a guess",
        "notes": [],
        "eos_token_ids": [2],
    }
    data = sum(file.stat().st_size for file in quantised.glob("*.safetensors"))
    headers = sum(8 + struct.unpack("<Q", file.read_bytes()[:8])[0] for file in quantised.glob("*.safetensors"))
    assert report["bytes"] == data - headers
    assert report["problem"] is None
    shown = invoke("info", quantised).stdout
    for words in ("4-bit g64", "bfloat16", "mistral-v1", "tiny-mixtral", "1,024 tokens"):
        assert words in shown
    assert "tok/s" in invoke("info", quantised, "--chip", "M4").stdout


def test_weights_are_not_read(invoke: Invoke, checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("mlx_mixtral.weights.checkpoint.read_into", refuse)
    assert json_of(invoke, checkpoint_copy)["bytes"] == 2 * 8_429_184


def test_what_is_not_used_and_what_is_missing_is_said(invoke: Invoke, checkpoint_copy: Path) -> None:
    save_file({"extra": np.zeros(2, np.float32)}, checkpoint_copy / "zzz.safetensors")
    report = json_of(invoke, checkpoint_copy)
    assert report["unused_files"] == ["zzz.safetensors"]
    assert "Not used: 1 file (zzz.safetensors)" in invoke("info", checkpoint_copy).stdout
    save_file({"extra": np.zeros(2, np.float32)}, checkpoint_copy / "zzy.safetensors")
    assert "Not used: 2 files (zzy.safetensors, zzz.safetensors)" in invoke("info", checkpoint_copy).stdout
    (checkpoint_copy / "zzy.safetensors").unlink()

    (checkpoint_copy / "tokenizer.model").unlink()
    assert json_of(invoke, checkpoint_copy)["tokenizer"]["kind"] is None
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = invoke("info", checkpoint_copy)
    assert broken.exit_code == 0
    assert "cannot be loaded as it is" in broken.stdout
    assert "truncated" in broken.stdout


def test_folders_that_are_no_models_are_one_line(invoke: Invoke, tmp_path: Path) -> None:
    assert_one_error(invoke("info", tmp_path), "not a checkpoint")
    assert_one_error(invoke("info", "8x8b"), "no such folder")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert_one_error(invoke("info", tmp_path), "gpt2")


def test_token_counts_are_short_and_never_rounded_up() -> None:
    assert [tokens_short(n) for n in (1000, 1024, 1636, 2047, 4096, 15360, 32767, 32768)] == [
        "1000", "1k", "1.5k", "1.9k", "4k", "15k", "31k", "32k",
    ]  # fmt: skip


def test_a_repository_without_its_weights_here_is_sized_by_its_configuration(
    invoke: Invoke, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(source: str, *, weights: bool, **_: object) -> Path:
        assert (source, weights) == ("someone/tiny-4bit", False)
        ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
        return Path(shutil.copytree(quantised, tmp_path / "snapshot", ignore=ignored))

    real = json_of(invoke, quantised)
    monkeypatch.setattr("mlx_mixtral.cli.progress.resolve", resolve)
    report = json_of(invoke, "someone/tiny-4bit")
    assert report["problem"] is None
    assert (report["bytes"], report["bytes_per_token"]) == (real["bytes"], real["bytes_per_token"])
    assert [part["bytes"] for part in report["parts"]] == [part["bytes"] for part in real["parts"]]
