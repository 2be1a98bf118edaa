"""The figures a conversion reports, its progress, and what a dry run promises."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from mlx_mixtral_convert import ConversionReport, Progress, Recipe, convert
from tests.convert.support import CONFIG, hashes, make_checkpoint, measured, weights


def test_figures_are_those_of_the_files(tiny: Path, tmp_path: Path) -> None:
    report = convert(tiny, tmp_path / "out", recipe=Recipe(4, 64))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.output_bytes == written
    assert report.source_bytes == (tiny / "model.safetensors").stat().st_size
    assert report.disk_needed_bytes >= sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert report.layers == 6
    assert report.resumed_layers == 0
    assert report.seconds > 0
    assert 10**7 < report.peak_memory_bytes < 10**11
    assert 4.5 < report.bits_per_weight < 4.6
    total = sum(part.bytes for part in report.sizes_by_part.values())
    assert report.bits_per_weight == pytest.approx(8 * total / report.parameters)
    assert report.sizes_by_part["router"].bits == 16
    assert report.sizes_by_part["expert"].bits == 4.5
    assert list(report.sizes_by_part) == ["attention", "router", "expert", "norm", "embedding", "head"]


def test_the_worst_matrices_come_first_and_agree_with_the_manifest(tiny: Path, tmp_path: Path) -> None:
    report = convert(tiny, tmp_path / "out", recipe=Recipe(4, 64, overrides={"*.k_proj": {"bits": 2}}))
    errors = json.loads((tmp_path / "out" / "conversion.json").read_text())["errors"]
    assert [entry.relative_rms for entry in report.worst] == sorted(
        (entry["relative_rms"] for entry in errors.values()), reverse=True
    )[:10]
    assert {entry.path.rsplit(".", 1)[1] for entry in report.worst[:6]} == {"k_proj"}
    assert report.worst[0].spec == "2-bit g64"


def test_a_report_is_frozen_and_becomes_json(tiny: Path, tmp_path: Path) -> None:
    report = convert(tiny, tmp_path / "out")
    entries = json.loads(json.dumps(report.to_dict()))
    assert {"source_bytes", "output_bytes", "bits_per_weight", "seconds", "peak_memory_bytes"} < set(entries)
    assert {"resumed_layers", "layers", "worst"} < set(entries)
    assert set(entries["worst"][0]) == {"path", "spec", "relative_rms", "worst"}
    assert set(entries["sizes_by_part"]["expert"]) == {"bytes", "bits"}
    with pytest.raises(FrozenInstanceError):
        report.layers = 3  # type: ignore[misc]


def test_a_dry_run_promises_what_the_run_delivers_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    before = hashes(tiny)
    planned = convert(tiny, tmp_path / "a" / "out", recipe=Recipe(3, 32), dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert hashes(tiny) == before
    done = convert(tiny, tmp_path / "a" / "out", recipe=Recipe(3, 32))
    assert planned.dry_run
    assert not done.dry_run
    assert planned.worst == ()

    def promised(report: ConversionReport) -> list[object]:
        return [
            report.output_bytes,
            report.source_bytes,
            report.bits_per_weight,
            dict(report.sizes_by_part),
            report.disk_needed_bytes,
            report.dtype,
        ]

    assert promised(planned) == promised(done)
    assert planned.expected_seconds is not None
    assert planned.expected_seconds > 0
    assert planned.expected_memory_bytes is not None
    assert planned.expected_memory_bytes > done.peak_memory_bytes > 0
    assert done.expected_seconds is done.expected_memory_bytes is None


def test_expected_memory_grows_with_the_largest_matrix_and_not_with_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral_convert.estimate.peak_memory_bytes", lambda: 0)

    def expected(**shape: int) -> int:
        source = make_checkpoint(tmp_path / "-".join(map(str, shape.values())), **shape)
        found = convert(source, tmp_path / "out", dry_run=True).expected_memory_bytes
        assert found is not None
        return found

    few = expected(num_hidden_layers=1, vocab_size=4096)
    assert expected(num_hidden_layers=6, vocab_size=4096) == few
    # Three matrices in bfloat16, and their packed forms of 4.5 bits.
    assert expected(num_hidden_layers=1, vocab_size=8192) - few == 3 * 4096 * 128 * (2 + 4.5 / 8)


@pytest.mark.parametrize("rounding", ["gptq", "tuned"])
def test_what_rounds_layer_by_layer_holds_nothing_of_layers_beside_a_large_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    monkeypatch.setattr("mlx_mixtral_convert.estimate.peak_memory_bytes", lambda: 0)

    def expected(vocab_size: int, chosen: str) -> int:
        source = make_checkpoint(tmp_path / f"{vocab_size}-{chosen}", vocab_size=vocab_size)
        options = {"recipe": Recipe(4, rounding=chosen), "calibration": measured(source), "dry_run": True}
        found = convert(source, tmp_path / "out", **options).expected_memory_bytes
        assert found is not None
        return found

    assert expected(2048, rounding) > expected(2048, "plain")
    assert expected(65536, rounding) == expected(65536, "plain")


def test_a_dry_run_still_refuses_what_the_run_would(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(Exception, match="was not made by a conversion"):
        convert(source, tmp_path / "out", dry_run=True)


def test_progress_counts_source_bytes_to_the_end(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    seen: list[Progress] = []
    threads: set[int] = set()

    def progress(step: Progress) -> None:
        seen.append(step)
        threads.add(threading.get_ident())

    convert(source, tmp_path / "out", progress=progress)
    total = sum(2 * value.size for name, value in weights(CONFIG).items() if "norm" not in name)
    assert threads == {threading.get_ident()}
    assert [step.done_bytes for step in seen] == sorted(step.done_bytes for step in seen)
    assert {step.total_bytes for step in seen} == {total}
    assert [step.stage for step in seen] == ["convert"] * (len(seen) - 1) + ["finish"]
    assert seen[-1].done_bytes == seen[-2].done_bytes == total
    assert {step.layer for step in seen} == {None, 0, 1}
    assert {step.layers for step in seen} == {2}
    assert len(seen) == 1 + 2 + 2 * (4 + 1 + 3 * 4)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (None, b"", "there is no tokenizer"),
        ("tokenizer.model", b"junk", r"the tokenizer cannot be used: tokenizer\.model .*"),
        (
            "tokenizer_config.json",
            b"{junk",
            r"the tokenizer cannot be used: tokenizer_config\.json is not valid JSON.*",
        ),
        ("tokenizer.json", b"{junk", r"the tokenizer cannot be used: tokenizer\.json .*"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_noted(
    tiny: Path, tmp_path: Path, name: str | None, content: bytes, note: str, dry_run: bool
) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    if name != "tokenizer_config.json":
        (source / "tokenizer.model").unlink()
    if name is not None:
        (source / name).write_bytes(content)
    report = convert(source, tmp_path / "out", dry_run=dry_run)
    (found,) = report.notes
    assert re.fullmatch(f"{note}; the result will accept only token ids", found)
    assert "/tmp" not in found
    assert report.to_dict()["notes"] == [found]


def test_a_good_tokenizer_needs_no_note(tiny: Path, tmp_path: Path) -> None:
    assert convert(tiny, tmp_path / "out", dry_run=True).notes == ()
