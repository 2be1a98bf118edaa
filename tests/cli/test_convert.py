"""``convert``: options become the recipe, the report is the converter's, failures leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from mlx_mixtral import load
from mlx_mixtral.cli import progress
from mlx_mixtral.cli.convert import tables
from mlx_mixtral_convert import Progress
from tests.convert.adapter_writer import write_mlx_adapter

from .conftest import SLOW_READS, Invoke, Spawn, assert_one_error
from .terminal import Terminal


def quantization(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text())["quantization"])


def test_report_names_sizes_parts_worst_matrices_and_the_next_command(
    invoke: Invoke, tiny: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    result = invoke("convert", tiny, dest)
    assert result.exit_code == 0
    written = sum(file.stat().st_size for file in dest.glob("*.safetensors"))
    assert f"16.9 MB -> {written / 1e6:.3g} MB, 4.51 bits per weight" in result.stdout
    for word in ("experts", "4.50", "router", "16.00", "peak memory", "relative error", "4-bit g64"):
        assert word in result.stdout
    assert "Next: mlx-mixtral generate" in result.stdout.splitlines()[-1]
    assert result.stderr == ""
    with load(dest) as model:
        assert model.generate("And God", max_tokens=2).token_ids


def test_matrices_that_differ_on_purpose_are_not_called_errors(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    assert invoke("calibrate", short, tmp_path / "file", "--tokens", 1024).exit_code == 0
    options = ("--rounding", "gptq", "--calibration", tmp_path / "file")
    result = invoke("convert", short, tmp_path / "out", *options)
    assert result.exit_code == 0
    assert "Farthest from the source's weights" in result.stdout
    assert "down_proj differ on purpose" in result.stdout
    assert "quantisation errors" not in result.stdout


def test_a_terminal_shows_how_long_the_layers_still_take(
    invoke: Invoke, spawn: Spawn, short: Path, tmp_path: Path
) -> None:
    assert invoke("calibrate", short, tmp_path / "file", "--tokens", 1024).exit_code == 0
    options = ("--rounding", "gptq", "--calibration", tmp_path / "file")
    screen = Terminal(spawn, tmp_path, short, tmp_path / "out", *options, command="convert", COLUMNS="120")
    assert screen.end() == 0
    assert re.search(r"convert layer \d+/\d+ .* \d[\d.]* s left", screen.text)


def test_the_pace_of_the_embedding_says_nothing_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(tables, "err_console", lambda: console)
    monkeypatch.setattr(progress, "err_console", lambda: console)

    def shown(rounding: str, *seconds_left: float | None) -> tuple[object, str]:
        """The task, and what is said of its time, after steps with these times left."""
        bars = progress.byte_bars()
        monkeypatch.setattr(tables, "byte_bars", lambda: bars)
        with tables.conversion_progress(rounding) as show:
            for done, left in enumerate(seconds_left, start=1):
                show(Progress("convert", done, 10, 0, 2, "model.layers.0", left))
            (task,) = bars.tasks
            return task.fields, str(bars.columns[-1].render(task))

    assert shown("gptq", None, None, None)[1] == "-:--:--"
    assert shown("gptq", None, 7505.0)[1] == shown("tuned", 7505.0, None)[1] == "2 h 05 min left"
    assert shown("plain", None, None, None)[0] == {}  # Rich's own estimate


def test_json_is_the_converters_report(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("convert", tiny, tmp_path / "out", "--bits", 3, "--group-size", 32, "--json")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["source_bytes"] == (tiny / "model.safetensors").stat().st_size
    assert report["output_bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert report["layers"] == 6
    assert {"bits_per_weight", "seconds", "peak_memory_bytes", "resumed_layers", "worst"} <= report.keys()
    assert report["worst"][0]["relative_rms"] >= report["worst"][-1]["relative_rms"] > 0
    assert quantization(tmp_path / "out")["bits"] == 3
    assert quantization(tmp_path / "out")["group_size"] == 32


@pytest.mark.parametrize(
    ("flags", "bits", "group_size", "mode"),
    [
        ([], 4, 64, "affine"),
        (["--mode", "mxfp4"], 4, 32, "mxfp4"),
        (["--mode", "mxfp8"], 8, 32, "mxfp8"),
        (["--mode", "nvfp4"], 4, 16, "nvfp4"),
        (["--bits", "8", "--group-size", "128"], 8, 128, "affine"),
    ],
)
def test_options_reach_the_recipe(
    invoke: Invoke, short: Path, tmp_path: Path, flags: list[str], bits: int, group_size: int, mode: str
) -> None:
    assert invoke("convert", short, tmp_path / "out", *flags, "--json").exit_code == 0
    entry = quantization(tmp_path / "out")
    assert (entry["bits"], entry["group_size"], entry.get("mode", "affine")) == (bits, group_size, mode)


def test_bits_none_and_dtype_convert_without_quantising(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("convert", tiny, tmp_path / "out", "--bits", "none", "--dtype", "float16", "--json")
    assert json.loads(result.stdout)["bits_per_weight"] == 16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert "float16" in (config.get("dtype"), config.get("torch_dtype"))


def test_overrides_and_recipe_files(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"bits": 3, "overrides": {"lm_head": {"bits": 6}, "model.embed_tokens": False}}))
    flags = ["--recipe", recipe, "--override", "*.self_attn.*=8:32", "--override", "lm_head=5", "--json"]
    assert invoke("convert", tiny, tmp_path / "out", *flags).exit_code == 0
    entry = quantization(tmp_path / "out")
    attention, head = entry["model.layers.0.self_attn.q_proj"], entry["lm_head"]
    assert isinstance(attention, dict)
    assert isinstance(head, dict)
    assert (attention["bits"], attention["group_size"], head["bits"]) == (8, 32, 5)
    assert entry["model.embed_tokens"] is False
    assert entry["bits"] == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--bits", "7"],
        ["--bits", "none", "--mode", "mxfp4"],
        ["--bits", "none", "--group-size", "32"],
        ["--bits", "none", "--rounding", "search"],
        ["--bits", "none", "--rounding", "gptq", "--override", "lm_head=none"],
        ["--bits", "none", "--mode", "mxfp8", "--override", "lm_head=4"],
        ["--override", "nothing"],
        ["--override", "=4"],
        ["--override", "lm_head=four"],
        ["--recipe", "r.json", "--bits", "4"],
        ["--recipe", "r.json", "--mode", "affine"],
        ["--recipe", "r.json", "--group-size", "64"],
    ],
)
def test_malformed_options_are_usage_errors(invoke: Invoke, tiny: Path, tmp_path: Path, flags: list[str]) -> None:
    assert invoke("convert", tiny, tmp_path / "out", *flags).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing_and_promises_what_a_run_gives(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    planned = json.loads(invoke("convert", tiny, tmp_path / "out", "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in invoke("convert", tiny, tmp_path / "out", "--dry-run").stdout
    assert list(tmp_path.iterdir()) == []
    done = json.loads(invoke("convert", tiny, tmp_path / "out", "--json").stdout)
    assert planned["output_bytes"] == done["output_bytes"]


def test_a_conversion_is_replaced_on_request_only(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert invoke("convert", short, ours, "--bits", 4).exit_code == 0
    assert_one_error(invoke("convert", short, ours, "--bits", 3), "--overwrite")
    assert quantization(ours)["bits"] == 4
    assert invoke("convert", short, ours, "--bits", 3, "--overwrite").exit_code == 0
    assert quantization(ours)["bits"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_destination_that_cannot_be_written(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere but there
        assert_one_error(invoke("convert", tiny, "/proc/out"), "/proc/out")
    else:
        assert_one_error(invoke("convert", tiny, locked / "out"), "locked")
        assert list(locked.iterdir()) == []


def test_bad_sources_are_one_line_and_leave_nothing(invoke: Invoke, checkpoint_copy: Path, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "out"
    (tmp_path / "empty").mkdir()
    assert_one_error(invoke("convert", tmp_path / "absent", dest), "absent")
    assert_one_error(invoke("convert", tmp_path / "empty", dest), "empty", "not a checkpoint")
    assert_one_error(invoke("convert", checkpoint_copy, dest, "--recipe", tmp_path / "no.json"), "no.json")
    assert_one_error(invoke("convert", checkpoint_copy, dest, "--bits", 4, "--group-size", 48), "48")
    assert_one_error(invoke("convert", checkpoint_copy, dest, "--override", "nowhere=4"), "nowhere")
    assert_one_error(invoke("convert", checkpoint_copy, dest, "--override", "*.gate=4"), "router")
    config, weights = checkpoint_copy / "config.json", checkpoint_copy / "model.safetensors"
    known = config.read_text()
    config.write_text(known.replace('"mixtral"', '"qwen2_moe"'))
    assert_one_error(invoke("convert", checkpoint_copy, dest), "qwen2_moe")
    config.write_text(known)
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_error(invoke("convert", checkpoint_copy, dest), "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "empty"]


def test_ctrl_c_leaves_nothing_half_written(spawn: Spawn, tiny: Path, tmp_path: Path) -> None:
    process = spawn("convert", tiny, tmp_path / "out", before=SLOW_READS)
    assert process.stderr is not None
    for _ in range(10):
        assert process.stderr.readline() == b"reading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == b""
    assert err.replace(b"reading\n", b"") == b"interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_where_the_same_command_goes_on(
    invoke: Invoke, spawn: Spawn, tiny: Path, quantised: Path, tmp_path: Path
) -> None:
    process = spawn("convert", tiny, tmp_path / "out", before=SLOW_READS.replace("0.1", "0.01"))
    assert process.stderr is not None
    # 29 matrices and two norms per layer, and one read ahead.
    for _ in range(2 * 31 + 10):
        assert process.stderr.readline() == b"reading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.replace(b"reading\n", b"") == b"interrupted; repeat the command to continue from layer 3 of 6\n"
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    refused = invoke("convert", tiny, tmp_path / "out", "--bits", 8)
    assert_one_error(refused, "unfinished conversion", "recipe.bits 4, but this one has 8", "--restart")
    result = invoke("convert", tiny, tmp_path / "out")
    assert result.exit_code == 0
    assert ", 2 of 6 layers kept from an earlier run" in result.stdout
    for path in quantised.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    again = invoke("convert", tiny, tmp_path / "out", "--bits", 8, "--overwrite", "--restart", "--json")
    assert json.loads(again.stdout)["resumed_layers"] == 0


def test_a_folder_cannot_be_streamed(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    assert_one_error(invoke("convert", tiny, tmp_path / "out", "--stream"), "is not a hub repository")


def test_matrices_an_override_packs_take_group_size_and_rounding(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    flags = ("--bits", "none", "--override", "lm_head=4", "--group-size", 32, "--rounding", "search", "--json")
    assert invoke("convert", tiny, tmp_path / "out", *flags).exit_code == 0
    recipe = json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]
    assert (recipe["rounding"], recipe["overrides"]["lm_head"]["group_size"]) == ("search", 32)


@pytest.mark.parametrize("to", [(), ("--to", "hf")])
def test_a_dry_run_says_that_the_disk_is_too_small(
    invoke: Invoke, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: tuple[str, ...]
) -> None:
    assert "lack of disk" not in invoke("convert", tiny, tmp_path / "out", "--dry-run", *to).stdout
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    result = invoke("convert", tiny, tmp_path / "out", "--dry-run", *to)
    assert result.exit_code == 0
    assert "bits per weight" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("A real run would be refused for lack of disk space: ")


def test_a_tokenizer_that_cannot_be_used_is_noted_and_the_model_converts(
    invoke: Invoke, checkpoint_copy: Path, tmp_path: Path
) -> None:
    (checkpoint_copy / "tokenizer.model").write_bytes(b"junk")
    result = invoke("convert", checkpoint_copy, tmp_path / "out")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("note: the tokenizer cannot be used: tokenizer.model ")
    assert (
        "tokenizer cannot be used"
        in json.loads(invoke("convert", checkpoint_copy, tmp_path / "b", "--dry-run", "--json").stdout)["notes"][0]
    )


@pytest.fixture
def lora(short: Path, tmp_path: Path) -> Path:
    write_mlx_adapter(tmp_path / "lora", json.loads((short / "config.json").read_text()), ("self_attn.q_proj",))
    return tmp_path / "lora"


def test_adapters_are_fused_by_their_scales_and_named(invoke: Invoke, short: Path, lora: Path, tmp_path: Path) -> None:
    shutil.copytree(lora, tmp_path / "x=2")
    given = ["--adapter", lora, "--adapter", f"{lora}=-0.5", "--adapter", tmp_path / "x=2"]
    result = invoke("convert", short, tmp_path / "out", *given, "--dry-run")
    assert result.exit_code == 0
    for line in (
        "fused: lora (mlx-lm, scale 1, rank 4) into 2 tensors",
        "scale -0.5, rank 4) into 2",
        "fused: x=2 (mlx-lm",
    ):
        assert line in result.stdout
    assert not (tmp_path / "out").exists()
    report = json.loads(invoke("convert", short, tmp_path / "out", *given, "--json").stdout)
    assert [(each["name"], each["scale"]) for each in report["adapters"]] == [("lora", 1), ("lora", -0.5), ("x=2", 1)]


@pytest.mark.parametrize("scale", ["", "big", "nan", "1e400"])
def test_a_scale_that_is_no_number_is_one_line(
    invoke: Invoke, short: Path, lora: Path, tmp_path: Path, scale: str
) -> None:
    result = invoke("convert", short, tmp_path / "out", "--adapter", f"{lora}={scale}")
    assert_one_error(result, "the scale is")
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_place_of_the_source_is_told_how_to_be_fused(
    invoke: Invoke, short: Path, lora: Path, tmp_path: Path
) -> None:
    result = invoke("convert", lora, tmp_path / "out")
    assert_one_error(result, f"DEST --adapter {lora}")
    assert invoke("convert", short, tmp_path / "out", "--adapter", lora).exit_code == 0
