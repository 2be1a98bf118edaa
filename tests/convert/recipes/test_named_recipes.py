"""Named recipes, and the options of the program that choose among ways to convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mixtral.cli.app import app
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConfigError, InvalidRequestError
from mlx_mixtral_convert import NAMED, Recipe, named_recipe
from tests.convert.support import CONFIG, make_checkpoint

MIXTRAL = MixtralConfig.from_hf(CONFIG)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", NAMED)
def test_the_trunk_has_more_bits_than_the_experts_and_the_router_all(name: str) -> None:
    assigned = named_recipe(name).assign(MIXTRAL)
    by_part: dict[str, set[int]] = {}
    for matrix in matrices(MIXTRAL):
        spec = assigned[matrix.path]
        by_part.setdefault(matrix.part, set()).add(16 if spec is None else spec.bits)
    assert by_part["router"] == {16}
    assert max(by_part["expert"]) < min(by_part["attention"] | by_part["embedding"] | by_part["head"])
    assert min(by_part["expert"]) == int(name.removeprefix("experts-")[0])


def test_a_name_a_file_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"bits": 3, "rounding": "search"}))
    assert named_recipe(str(tmp_path / "own.json")) == Recipe(3, rounding="search")
    with pytest.raises(InvalidRequestError, match="the named recipes are experts-2bit, experts-3bit"):
        named_recipe("exprts-3bit")
    with pytest.raises(ConfigError, match="rounding 'best' is unknown; use plain, search, gptq"):
        Recipe(rounding="best")
    assert Recipe.from_dict(Recipe(3, rounding="gptq").to_dict()) == Recipe(3, 64, rounding="gptq")


def test_a_named_recipe_with_searched_rounding_converts(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    done = run("convert", source, tmp_path / "out", "--recipe", "experts-3bit", "--rounding", "search", "--json")
    assert done.exit_code == 0, done.stderr
    recorded = json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]
    assert Recipe.from_dict(recorded) == Recipe.from_dict(NAMED["experts-3bit"].to_dict() | {"rounding": "search"})
    assert json.loads(done.stdout)["predicted_kl"] > 0


def test_a_dry_run_with_a_size_shows_parts_and_expected_loss(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    done = run("convert", source, tmp_path / "out", "--fit", "400kB", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "expected loss" in done.stdout
    assert "bits per weight" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fit", "100kB"), "the smallest it can be is"),
        (("--fit", "mac"), "give a size"),
        (("--calibration", "absent"), "absent cannot be read"),
        (("--recipe", "best"), "the named recipes are experts-2bit"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run("convert", make_checkpoint(tmp_path / "source"), tmp_path / "out", *options)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    "options", [("--fit", "1MB", "--bits", "4"), ("--fit", "1MB", "--recipe", "experts-3bit"), ("--context", "9")]
)
def test_options_that_contradict_are_a_usage_error(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("convert", tmp_path, tmp_path / "out", *options)
    assert done.exit_code == 2


def test_calibrate_writes_a_file_that_convert_takes(short: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration"
    done = run("calibrate", short, file, "--tokens", 1024, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 1024
    done = run("convert", short, tmp_path / "out", "--rounding", "search", "--calibration", file, "--json")
    assert done.exit_code == 0, done.stderr
