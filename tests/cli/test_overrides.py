"""``--experts-per-token``, ``--rope-scaling`` and ``--rope-theta`` on every command that runs a model, or plans for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import load
from mlx_mixtral.cli.options import LoadOptions, OverrideOptions
from mlx_mixtral.evaluation.reference import Reference

from .conftest import Invoke, assert_one_error

TEXT = "And God said unto him, Behold, I will make thee a great nation, and the seed of thee shall be as the stars."
GIVEN = ("--experts-per-token", 3, "--rope-scaling", "yarn=2", "--rope-theta", 5e5)
AS_LOADED: dict[str, Any] = {"experts_per_token": 3, "rope_scaling": "yarn=2", "rope_theta": 5e5}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4)
    return path


def test_generate_and_chat_run_what_load_runs(invoke: Invoke, short: Path) -> None:
    prompt = "In the beginning God created the heaven and"
    with load(short, **AS_LOADED) as model:
        wanted = model.generate(prompt, max_tokens=8).token_ids
    with load(short) as model:
        assert model.generate(prompt, max_tokens=8).token_ids != wanted
    found = json.loads(invoke("generate", short, "-p", prompt, "-n", 8, "--json", *GIVEN).stdout)
    assert tuple(found["token_ids"]) == wanted
    # The context is stretched: more than the checkpoint's own 1024 tokens.
    assert invoke("generate", short, "-p", TEXT, "-n", 2, *GIVEN, "--context", 2048).exit_code == 0
    assert invoke("chat", short, "-n", 2, *GIVEN, input="Hello\n").exit_code == 0


def test_evaluate_measures_it_and_a_reference_model_keeps_its_own_number(
    invoke: Invoke, short: Path, text: Path, tmp_path: Path
) -> None:
    run = ("evaluate", short, "--text", text, "--window", 64, "--json")
    own = json.loads(invoke(*run, "--reference", short).stdout)
    fewer = json.loads(invoke(*run, "--reference", short, "--experts-per-token", 1).stdout)
    assert own["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert fewer["kl_mean"] > 1e-3
    # The rope is the reference's too: long windows need it there as well.
    both = json.loads(invoke(*run, "--reference", short, "--rope-scaling", "linear=2").stdout)
    assert both["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert both["perplexity"] != pytest.approx(own["perplexity"], rel=1e-3)
    # What is kept of one run is not taken for another.
    places = [tmp_path / f"reference-{number}" for number in range(2)]
    for place, options in zip(places, ((), ("--experts-per-token", 1)), strict=True):
        assert invoke(*run, "--save-reference", place, *options).exit_code == 0
    assert len({Reference(place).header.identity for place in places}) == 2
    changed = [OverrideOptions(), OverrideOptions(rope_theta=1e5), OverrideOptions(experts_per_token=1)]
    assert len({str(LoadOptions(overrides=given).identity()) for given in changed}) == 3


def test_routing_and_report_show_as_many(invoke: Invoke, short: Path, text: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    run = ("routing", short, "--text", text, "--experts-per-token", 3, "--save-trace", trace, "--json")
    assert json.loads(invoke(*run).stdout)["experts_per_token"] == 3
    assert_one_error(invoke("routing", short, "--trace", trace), "3 of 8 experts per token", "2 of 8")
    found = invoke(
        "report", short, "--text", text, "--quick", "--no-plots", "--output", tmp_path / "card", "--json",
        "--experts-per-token", 3,
    )  # fmt: skip
    report = json.loads(found.stdout)
    assert report["checkpoint"]["experts_per_token"] == report["routing"]["experts_per_token"] == 3


def test_bench_measures_it_beside_mlx_lm_with_as_many(invoke: Invoke, short: Path) -> None:
    few = ("--prompt", "none", "--depth", 8, "--batch", "none", "--tokens", 2, "--repeats", 1, "--json")

    def bytes_per_token(*options: object) -> int:
        found = json.loads(invoke("bench", short, *few, *options).stdout)
        sides = found["decode"][0]["sides"]
        assert "--compare" not in options or "tok_s" in sides["mlx-lm float32"]
        return int(found["decode"][0]["bytes_per_token"])

    with load(short) as model:
        expert = sum(model.residency.sizes.expert_bytes)
    assert bytes_per_token("--compare", "mlx-lm", "--experts-per-token", 4) - bytes_per_token() == 2 * expert
    assert_one_error(invoke("bench", short, "--compare", "mlx-lm", *GIVEN[2:4]), "--rope-scaling", "leave them out")


def test_info_counts_and_plans_it(invoke: Invoke, short: Path) -> None:
    own, more = (json.loads(invoke("info", short, "--json", *options).stdout) for options in ((), GIVEN))
    assert (own["experts_per_token"], more["experts_per_token"]) == (2, 3)
    assert (own["context"], more["context"]) == (1024, 2048)
    assert more["active_parameters"] > own["active_parameters"]
    plans = [
        json.loads(invoke("info", short, "--memory", "20MB", "--json", "--experts-per-token", chosen).stdout)["memory"]
        for chosen in (1, 3)
    ]
    assert plans[0]["min_bytes"] < plans[1]["min_bytes"]
    published = json.loads(invoke("info", "8x7b", "--json", "--experts-per-token", 1).stdout)
    assert 7e9 < published["active_parameters"] < 8e9  # 12.9 billion with two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rope-scaling", "ntk=2"), "write KIND=FACTOR"),
        (("--experts-per-token", 0), "at least 1"),
        (("--rope-theta", 0), "a number above 1"),
    ],
)
def test_bad_values_are_one_line_before_a_model_is_looked_for(
    invoke: Invoke, options: tuple[object, ...], said: str
) -> None:
    generate = ("generate", "nowhere/at-all", "-p", "x")
    for command in (generate, ("bench", "nowhere/at-all"), ("info", "nowhere/at-all")):
        assert_one_error(invoke(*command, *options), said)


def test_more_context_than_there_is_says_how_to_get_it(invoke: Invoke, short: Path) -> None:
    for command in (("generate", short, "-p", "x"), ("bench", short), ("info", short, "--memory", "1GB")):
        result = invoke(*command, "--context", 3000)
        assert_one_error(result, "context is 3000; the model's own is 1024 tokens", "--rope-scaling yarn=3")
    advised = ("--context", 3000, "--rope-scaling", "yarn=3")
    assert invoke("generate", short, "-p", "x", "-n", 1, *advised).exit_code == 0
