"""Exports to GGUF that cannot be: one clear line each, and nothing left behind."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mixtral.cli.app import app
from mlx_mixtral.cli.convert.options import FORMATS, GGUF_TYPES
from mlx_mixtral.errors import (
    ConfigError,
    ConversionError,
    DestinationError,
    DiskSpaceError,
    DtypeRangeError,
    InvalidRequestError,
    MissingDependencyError,
    MixtralError,
    NonFiniteWeightsError,
    TokenizerError,
)
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.export import TYPES, export
from tests.convert.export_support import PIECES, add_tokenizer, fields, spm_model
from tests.convert.support import EXPERT, Tensors, make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return add_tokenizer(make_checkpoint(tmp_path / "source"))


def refused(source: Path, dest: Path, error: type[MixtralError], match: str, **options: Any) -> None:
    before = sorted(dest.parent.iterdir()) if dest.parent.is_dir() else None
    with pytest.raises(error, match=match) as caught:
        export(source, dest, to="gguf", **options)
    assert "\n" not in str(caught.value)
    assert (sorted(dest.parent.iterdir()) if dest.parent.is_dir() else None) == before


def test_an_unknown_type(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out.gguf", InvalidRequestError, "'IQ4_XS' is unknown for gguf; use F16", type="IQ4_XS")


def test_rows_that_do_not_divide_into_blocks(tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", intermediate_size=80))
    match = r"down_proj has rows of 80 weights, .* Q8_0's blocks of 32; use F16"
    refused(source, tmp_path / "out.gguf", InvalidRequestError, match, type="Q8_0")
    export(source, tmp_path / "out.gguf", to="gguf", type="F16")


def test_a_destination_that_is_there(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out.gguf"
    dest.write_bytes(b"a letter")
    refused(source, dest, DestinationError, "already exists; replace it with --overwrite")
    refused(source, dest, DestinationError, "is not a GGUF file", overwrite=True)
    assert dest.read_bytes() == b"a letter"
    dest.write_bytes(b"GGUF of old")
    export(source, dest, to="gguf", overwrite=True)
    assert fields(dest)["llama.block_count"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "source"]


def test_a_destination_of_the_wrong_kind(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "folder", DestinationError, r"ends in \.gguf")
    (tmp_path / "folder.gguf").mkdir()
    refused(source, tmp_path / "folder.gguf", DestinationError, "not a file", overwrite=True)
    refused(source, source / "out.gguf", DestinationError, "inside the source")
    refused(source, source / "config.json" / "out.gguf", DestinationError, "inside the source")
    (tmp_path / "file").write_text("x")
    refused(source, tmp_path / "file" / "out.gguf", DestinationError, "is a file, not a folder")


def test_missing_folders_are_made_and_removed_again(source: Path, tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "out.gguf"
    asked = iter([False] * 5)
    refused(source, deep, ConversionError, "export cancelled", cancelled=lambda: next(asked, True))
    assert not (tmp_path / "a").exists()
    export(source, deep, to="gguf")
    assert [path.name for path in deep.parent.iterdir()] == ["out.gguf"]


def test_a_failed_overwrite_keeps_the_old_file(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out.gguf"
    dest.write_bytes(b"GGUF of old")
    refused(source, dest, ConversionError, "cancelled", overwrite=True, cancelled=lambda: True)
    assert dest.read_bytes() == b"GGUF of old"


def test_leftovers_of_a_killed_export_are_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.gguf.partial").write_bytes(b"x" * 10_000_000)
    export(source, tmp_path / "out.gguf", to="gguf")
    export(source, tmp_path / "clean.gguf", to="gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "clean.gguf").read_bytes()


def test_two_exports_to_one_file(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out.gguf"

    def second(progress: Any) -> None:
        refused(source, dest, DestinationError, "another export is writing")

    export(source, dest, to="gguf", progress=second)
    assert fields(dest)["llama.block_count"] == 2


def test_too_little_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    refused(source, tmp_path / "out.gguf", DiskSpaceError, "smaller type")


def test_a_disk_that_fills_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real, left = os.write, [100_000]

    def write(descriptor: int, data: Any) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("mlx_mixtral_convert.export.gguf.os.write", write)
    refused(source, tmp_path / "out.gguf", DiskSpaceError, "the disk is full")


def test_no_tokenizer_or_anothers(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    refused(source, tmp_path / "out.gguf", TokenizerError, "has no tokenizer.model")
    pieces = PIECES + tuple((f"piece{i}", -9.0, 1) for i in range(55))
    (source / "tokenizer.model").write_bytes(spm_model(pieces))
    refused(source, tmp_path / "out.gguf", TokenizerError, "65 pieces, but the model's vocab_size is 64")
    (source / "tokenizer.model").write_bytes(b"\xff\xff")
    refused(source, tmp_path / "out.gguf", TokenizerError, "damaged")


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"type": "dynamic", "factor": 4.0}, "'dynamic' cannot be written to GGUF; default"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 20}, "'yarn' with a custom beta_fast"),
        ({"type": "yarn", "factor": 4.0, "truncate": False}, "'yarn' with a custom truncate"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 1.3}, "'yarn' with a custom attention_factor"),
        ({"type": "yarn", "factor": 0.5}, "'yarn' with a custom attention_factor"),
    ],
)
def test_rope_scaling_that_llama_cpp_would_compute_otherwise(
    scaling: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", rope_scaling=scaling))
    refused(source, tmp_path / "out.gguf", ConfigError, match)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_weight_beyond_float16s_scales(kind: str, tmp_path: Path) -> None:
    def huge(made: Tensors) -> None:
        made[EXPERT][3, 5] = 2.0**30

    source = add_tokenizer(make_checkpoint(tmp_path / "source", edit=huge))
    match = rf"experts\.2\.w2.* of {kind}; use BF16"
    refused(source, tmp_path / "out.gguf", DtypeRangeError, match, type=kind)
    export(source, tmp_path / "out.gguf", to="gguf", type="BF16")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_damaged_weights(kind: str, tmp_path: Path) -> None:
    def broken(made: Tensors) -> None:
        made[EXPERT][3, 5] = np.inf

    source = add_tokenizer(make_checkpoint(tmp_path / "source", edit=broken))
    refused(source, tmp_path / "out.gguf", NonFiniteWeightsError, r"experts\.2\.w2", type=kind)


def test_without_the_package(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    refused(source, tmp_path / "out.gguf", MissingDependencyError, "pip install")


def test_the_cli_offers_the_librarys_types() -> None:
    assert TYPES["gguf"] == GGUF_TYPES
    assert ("mlx", *TYPES) == FORMATS


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_cli_exports_and_reports(source: Path, tmp_path: Path) -> None:
    done = cli(source, tmp_path / "out.gguf", "--to", "gguf", "--type", "Q8_0")
    assert done.exit_code == 0, done.output
    size = (tmp_path / "out.gguf").stat().st_size
    assert f"{format_bytes(size)}, Q8_0, 8.54 bits per weight" in done.stdout
    assert "note: the source has no chat template" in done.stderr
    done = cli(source, tmp_path / "hf", "--to", "hf", "--dtype", "float16", "--json")
    assert '"type": "F16"' in done.stdout
    assert (tmp_path / "hf" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--bits", "4"], "--bits does not apply with --to gguf"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype does not apply with --to gguf; give --type"),
        (["--to", "hf", "--type", "F16"], "--type does not apply with --to hf; give --dtype"),
        (["--to", "hf", "--override", "lm_head=8"], "--override does not apply with --to hf"),
        (["--type", "F16"], "--type applies only with --to gguf"),
    ],
)
def test_cli_options_that_contradict(arguments: list[str], message: str, source: Path, tmp_path: Path) -> None:
    done = cli(source, tmp_path / "out.gguf", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out.gguf").exists()
