"""`upload`, and `convert --upload`: what they print, and what is left when the hub refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlx_mixtral_convert import Recipe, convert, verify
from tests.cli.conftest import Invoke


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def test_a_dry_run_prints_the_card(short: Path, tmp_path: Path, invoke: Invoke) -> None:
    convert(short, tmp_path / "mlx", recipe=Recipe(4))
    done = invoke("upload", tmp_path / "mlx", "me/model", "--dry-run", "--base-model", "them/base", "--license", "mit")
    assert done.exit_code == 0, done.output
    head, _, card = done.stdout.partition("\n\n")
    assert "me/model (dry run: nothing was uploaded)" in head
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["license"]) == ("them/base", "mit")
    assert json.loads(invoke("upload", tmp_path / "mlx", "me/model", "--dry-run", "--json").stdout)["private"] is True


@pytest.mark.usefixtures("no_token")
def test_a_conversion_stays_when_its_upload_fails(short: Path, tmp_path: Path, invoke: Invoke) -> None:
    done = invoke("convert", short, tmp_path / "mlx", "--upload", "me/model")
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "run `hf auth login`" in line
    assert f"mlx-mixtral upload {tmp_path / 'mlx'} me/model" in line
    assert verify(tmp_path / "mlx").ok


@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        (["--public"], "add --upload owner/name", 2),
        (["--upload", "me/model", "--dry-run"], "leave out one of them", 2),
        (["--upload", "model"], "write owner/name", 2),
    ],
)
def test_options_are_refused_before_anything_is_converted(
    options: list[str], message: str, status: int, short: Path, tmp_path: Path, invoke: Invoke
) -> None:
    done = invoke("convert", short, tmp_path / "mlx", *options)
    assert done.exit_code == status
    assert message in done.stderr
    assert not (tmp_path / "mlx").exists()
