"""``info --machines``: the plan as JSON and as tables, and what is said of values that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Invoke, assert_one_error

TWO = ("--machines", "64GB,64GB")


def machines_of(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    result = invoke("info", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout)["machines"])


def test_a_published_size_is_planned_at_every_width(invoke: Invoke) -> None:
    found = machines_of(invoke, "8x22B", *TWO, "--link", "thunderbolt5", "--chip", "M4 Max 40-core")
    assert found["is_prediction"] is True
    assert (found["chip"], found["bandwidth_gb_s"], found["link"]) == ("M4 Max 40-core", 546, "thunderbolt5")
    assert [machine["memory_gib"] for machine in found["machines"]] == [64, 64]
    plans = {plan["model"]: plan for plan in found["plans"]}
    assert list(plans) == ["2-bit", "3-bit", "4-bit", "5-bit", "6-bit", "8-bit", "16-bit"]
    assert plans["4-bit"]["auto"] == "experts"
    assert round(plans["4-bit"]["splits"]["experts"]["predicted_tok_s"]) == 24
    assert plans["16-bit"]["auto"] is None


def test_a_folder_is_planned_by_the_bytes_of_its_headers(invoke: Invoke, quantised: Path) -> None:
    (plan,) = machines_of(invoke, quantised, "--machines", "16GB,8GB")["plans"]
    report = json.loads(invoke("info", quantised, "--json").stdout)
    layers, experts = (plan["splits"][split]["machines"] for split in ("layers", "experts"))
    assert sum(machine["weight_bytes"] for machine in layers) == report["bytes"]
    assert sum(machine["layers"] for machine in layers) == report["layers"]
    assert sum(machine["expert_width"] for machine in experts) == report["intermediate_size"]
    assert all(machine["expert_width"] % 64 == 0 for machine in experts)
    for machine in (*layers, *experts):
        assert machine["bytes"] == pytest.approx(
            sum(machine[f"{part}_bytes"] for part in ("weight", "kv", "working")), abs=64
        )
    shown = invoke("info", quantised, "--machines", "16GB,8GB").stdout
    for words in ("A prediction", "0: 16 GB", "1: 8 GB", "this model", "What each machine holds"):
        assert words in shown


@pytest.mark.parametrize("machines", ["64GB,64GB", "64GB,32GB", "128GB,64GB,64GB,16GB"])
@pytest.mark.parametrize("model", ["8x7b", "8x22b"])
def test_tables_fit_80_columns(invoke: Invoke, model: str, machines: str) -> None:
    result = invoke("info", model, "--machines", machines, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.split("All machines have")[0].splitlines())) <= 80
    assert "\n4-bit " in result.stdout
    assert "no Mac was measured" in result.stdout
    assert "Source: " in result.stdout


def test_a_narrow_terminal_gets_lists(invoke: Invoke) -> None:
    shown = invoke("info", "8x7b", *TWO, env={"COLUMNS": "40"}).stdout
    assert "\n4-bit\n" in shown
    assert "\n  layers tok/s   39.4\n" in shown


def test_what_cannot_be_split_is_said(invoke: Invoke) -> None:
    shown = invoke("info", "8x7b", "--machines", ",".join(["16GB"] * 33)).stdout
    assert "33 machines cannot share 32 layers: every machine needs one; use at most 32" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--machines", "64GB"), "'64GB' is one machine; give at least two"),
        (("--machines", "64GB,much"), "'much' is not the memory of a machine"),
        ((*TWO, "--link", "usb"), "'usb' is unknown; use one of thunderbolt"),
        ((*TWO, "--chip", "M3 Max"), "name 'M3 Max 30-core' (300 GB/s)"),
        ((*TWO, "--disk", "fast"), "'fast' is not a size"),
        ((*TWO, "--context", "0"), "context"),
    ],
)
def test_wrong_values_are_one_line(invoke: Invoke, options: tuple[str, ...], words: str) -> None:
    assert_one_error(invoke("info", "8x7b", *options), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--link", "wifi"), "--link applies only with --machines"),
        ((*TWO, "--memory", "8GB"), "leave out one of them"),
        (("--context", "9"), "apply only with --memory or --machines"),
    ],
)
def test_options_that_do_not_go_together_are_refused(invoke: Invoke, options: tuple[str, ...], words: str) -> None:
    result = invoke("info", "8x7b", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_folder_that_cannot_be_loaded_has_no_plan(invoke: Invoke, checkpoint_copy: Path) -> None:
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_error(invoke("info", checkpoint_copy, *TWO), "truncated")
