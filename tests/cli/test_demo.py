"""``demo``: runs on nothing but the package, says the same every time, leaves nothing behind unless told to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_mixtral import load
from mlx_mixtral.cli.demo import SAMPLES

from .conftest import Invoke, assert_one_error


def test_the_demo_shows_every_step_in_80_columns_and_cleans_up(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = invoke("demo")
    assert first.exit_code == 0
    assert first.stderr == ""
    assert max(map(len, first.stdout.splitlines())) <= 80
    for words in ("16.9 MB", "4.51 bits per weight", "tok/s", "peak memory", "mlx-mixtral convert mistralai/"):
        assert words in first.stdout
    assert "9 * 7 = 63" in first.stdout
    assert list(tmp_path.iterdir()) == []

    def without_figures(text: str) -> str:
        return re.sub(r"[\d.]+ (s|tok/s|MB)\b", "#", text)

    assert without_figures(invoke("demo").stdout) == without_figures(first.stdout)


def test_json_has_the_conversion_and_the_completions(invoke: Invoke, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    result = invoke("demo", "--json", "--keep", kept)
    report = json.loads(result.stdout)
    assert report["convert"]["bits_per_weight"] == pytest.approx(4.51, abs=0.01)
    assert [entry["prompt"] for entry in report["completions"]] == [sample.prompt for sample in SAMPLES]
    assert report["decode_tok_s"] > 0
    assert report["peak_memory_bytes"] > report["memory_bytes"] > 4_000_000
    greedy = SAMPLES[-1]
    with load(kept) as model:
        repeated = model.generate(greedy.prompt, max_tokens=greedy.max_tokens, stop=greedy.stop)
    assert report["completions"][-1]["text"] == repeated.text == " 63"
    assert_one_error(
        again := invoke("demo", "--keep", kept, "--json"), "is already a finished conversion; remove the folder"
    )
    assert "--overwrite" not in again.stderr


@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_demo_goes_on_only_where_something_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke, keep: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("repeat the command to continue from layer 5 of 6")
        raise error

    monkeypatch.setattr("mlx_mixtral_convert.convert", interrupted)
    result = invoke("demo", "--json", *(["--keep", tmp_path / "kept"] if keep else []))
    assert result.exit_code == 130
    note = "; repeat the command to continue from layer 5 of 6" if keep else ""
    assert result.stderr == f"interrupted{note}\n"
