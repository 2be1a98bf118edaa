"""``--memory``: budgets on the command line, and what ``info`` says about them before anything loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_mixtral import load

from .conftest import Invoke, assert_one_error

PROMPT = ("-p", "And God said", "-n", "12")


@pytest.fixture(scope="module")
def least(quantised: Path) -> int:
    with load(quantised) as model:
        return model.min_memory_bytes


def test_generate_streams_within_a_budget_and_says_so(invoke: Invoke, quantised: Path, least: int) -> None:
    whole = json.loads(invoke("generate", quantised, *PROMPT, "--json").stdout)
    for options in ((), ("--page-cache", "--policy", "lfu", "--lookahead", "auto")):
        result = invoke("generate", quantised, *PROMPT, "--json", "--memory", least + 1_000_000, *options)
        streamed = json.loads(result.stdout)
        assert streamed["token_ids"] == whole["token_ids"]
        stats = streamed["stats"]
        assert 0 < stats["hit_rate"] < 1
        assert stats["bytes_read_per_token"] > 0
        assert 0 < stats["readbacks_per_token"] <= 6
        assert stats["predicted_tok_s"] > 0
    assert "hit_rate" not in whole["stats"]
    text = invoke("generate", quantised, *PROMPT, "--memory", least)
    assert text.stderr.splitlines()[-1].startswith("experts: 0% in memory, ")
    assert "waiting for the disk (predicted " in text.stderr


def test_too_little_memory_is_one_line_that_names_what_is_enough(invoke: Invoke, quantised: Path) -> None:
    result = invoke("generate", quantised, *PROMPT, "--memory", "1MB")
    assert_one_error(result, "1 MB is too small", "the minimum is", "KV cache for 1024 tokens", "smaller context")
    enough = result.stderr.split("the minimum is ")[1].split(":")[0].replace(" ", "")
    assert invoke("generate", quantised, *PROMPT, "--memory", enough).exit_code == 0
    assert_one_error(invoke("info", quantised, "--memory", "1MB"), "the minimum is")


def test_info_plans_a_budget_without_loading(invoke: Invoke, quantised: Path, least: int) -> None:
    size = least + 600_000
    plan = json.loads(invoke("info", quantised, "--memory", size, "--json").stdout)["memory"]
    assert plan["budget_bytes"] == size
    assert plan["resident_bytes"] + plan["kv_bytes"] + plan["working_bytes"] <= size
    assert plan["streamed_layers"] == sum(count < 8 for count in plan["slots"]) > 0
    assert plan["predicted_tok_s"] > 0
    assert plan["speeds"]["disk_bytes_per_s"] > 0
    given = json.loads(
        invoke("info", quantised, "--memory", size, "--json", "--disk", "5GB", "--chip", "M2 Max").stdout
    )["memory"]
    assert given["speeds"]["disk_bytes_per_s"] == 5e9
    assert given["speeds"]["memory_bytes_per_s"] == 400e9
    table = invoke("info", quantised, "--memory", size)
    assert " of 6 " in table.stdout
    assert all(len(line) <= 80 for line in table.stdout.splitlines() if "──" in line or "this model" in line)
    everything = json.loads(invoke("info", quantised, "--memory", "1GB", "--json").stdout)["memory"]
    assert (everything["slots"], everything["streamed_layers"]) == ([8] * 6, 0)


def test_info_plans_published_sizes_for_a_chip(invoke: Invoke) -> None:
    report = json.loads(
        invoke("info", "8x7b", "--memory", "12GB", "--chip", "M2 Max", "--disk", "5GB", "--json").stdout
    )
    plans = {plan["model"]: plan for plan in report["memory"]}
    four = plans["4-bit"]
    assert four["resident_bytes"] + four["kv_bytes"] + four["working_bytes"] <= 12e9
    assert four["kv_bytes"] == pytest.approx(4096 * 131072 * 33 / 32)
    # 2 of 8 experts of 99 MB in 32 layers, less what is found in memory, at 5 GB/s.
    assert four["bytes_read_per_token"] == pytest.approx((1 - four["hit_rate"]) * 2 * 99e6 * (32 - 3), rel=0.05)
    assert four["predicted_tok_s"] < 5e9 / four["bytes_read_per_token"]
    assert plans["2-bit"]["predicted_tok_s"] > four["predicted_tok_s"] > plans["8-bit"]["predicted_tok_s"]
    assert_one_error(invoke("info", "8x7b", "--memory", "12GB"), "name one with --chip")
    small = json.loads(invoke("info", "8x22b", "--memory", "2GB", "--chip", "M1", "--json").stdout)["memory"]
    assert all("too small" in plan["problem"] for plan in small)
    assert "needs" in invoke("info", "8x22b", "--memory", "2GB", "--chip", "M1").stdout


def test_options_of_a_budget_need_one(invoke: Invoke) -> None:
    for options in (("--context", "100"), ("--disk", "5GB")):
        result = invoke("info", "8x7b", *options)
        assert result.exit_code == 2
        assert "--memory" in result.stderr
