"""Recipes for Macs: what ``info`` advises is what ``convert --fit`` does, and losses are those that were measured."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.info import recipes
from mlx_mixtral.info.estimate import BUILT_IN, PARTS, bytes_per_token, parameters
from mlx_mixtral.info.macs import CHIPS, MAC_MEMORY_GIB, Chip, find_chips, usable_bytes
from mlx_mixtral.info.plans import shape_plans
from mlx_mixtral.info.recipes import CONTEXT_TOKENS, MEASURED_KL, RECIPE_CHIPS, expected_kl, recipes_for, smallest
from mlx_mixtral.machine.device import Device
from mlx_mixtral.sizes import parse_size
from mlx_mixtral_convert.recipes.fit import fit
from mlx_mixtral_convert.recipes.machine import DEFAULT_CONTEXT_TOKENS, room_for_weights
from tests.markdown import tables

MODELS = ("8x7b", "8x22b")
EIGHT = BUILT_IN["8x7b"]
QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality.md"


def mac(memory_gib: int) -> Device:
    return Device("metal", "Apple M4", "applegpu_g16s", memory_gib * 2**30, usable_bytes(memory_gib))


@pytest.mark.parametrize("model", MODELS)
def test_the_size_advised_is_what_fit_mac_takes(model: str) -> None:
    """In whole GB: within one of what the converter computes on such a Mac, never above it."""
    config = BUILT_IN[model]
    found = [recipe for recipe in recipes_for(config) if recipe["kind"] != "streamed"]
    assert found
    for recipe in found:
        taken = room_for_weights(config, mac(recipe["memory_gib"]))
        if recipe["kind"] == "whole":
            assert recipe["bytes"] == 2 * parameters(config)[0] <= taken
        else:
            assert recipe["convert"] == f"--fit {taken // 10**9}GB"
            assert recipe["bytes"] == parse_size(recipe["convert"].removeprefix("--fit ")) <= taken
    assert CONTEXT_TOKENS == DEFAULT_CONTEXT_TOKENS


@pytest.mark.parametrize("model", MODELS)
def test_what_is_streamed_is_the_smallest_that_is_advised_and_fit_can_make_it(model: str) -> None:
    config, least = BUILT_IN[model], smallest(BUILT_IN[model])
    assert least - 10**8 < fit(config, least, overhead_bytes=recipes.HEADER_BYTES).data_bytes <= least
    with pytest.raises(MemoryBudgetError, match="the smallest it can be is") as refused:
        fit(config, least // 2, overhead_bytes=recipes.HEADER_BYTES)
    named = float(re.findall(r"([\d.]+) GB, at 1.2\d bits per weight", str(refused.value))[0]) * 1e9
    assert named < least
    for recipe in recipes_for(config):
        streams = room_for_weights(config, mac(recipe["memory_gib"])) < least
        assert (recipe["kind"] == "streamed") == streams
        if streams:
            assert recipe["bytes"] == parse_size(recipe["convert"].removeprefix("--fit ")) == least


def test_headers_of_the_largest_model_fit_what_is_left_for_them() -> None:
    """A tensor's entry in a header: its name, dtype, shape and two offsets, 250 bytes at most."""
    config = BUILT_IN["8x22b"]
    names = [matrix.path for matrix in matrices(config)]
    assert sum(3 * (250 + len(name)) for name in names) + 300 * len(list(norms(config))) < recipes.HEADER_BYTES


def test_bits_and_speed_are_those_of_the_conversion_that_fit_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for the assignment that ``fit`` finds, whose attention has more bits than its experts, and is near it."""
    config = replace(EIGHT, num_hidden_layers=8)
    monkeypatch.setattr(recipes, "MAC_MEMORY_GIB", (8,))
    (recipe,) = recipes_for(config, find_chips("M4"))
    assert recipe["kind"] == "fits"
    made = fit(config, recipe["bytes"])
    assert 8 * made.data_bytes / parameters(config)[0] == pytest.approx(recipe["bits_per_weight"], abs=0.01)
    specs, sizes = made.recipe.assign(config), dict.fromkeys(PARTS, 0)
    for matrix in matrices(config):
        spec, rows = specs[matrix.path], matrix.parameters // matrix.in_features
        sizes[matrix.part] += spec.nbytes(rows, matrix.in_features) if spec else 2 * matrix.parameters
    real = 120e9 / bytes_per_token(config, sizes)
    assert 0.9 * recipe["tok_s"]["M4"] < real < recipe["tok_s"]["M4"]


def test_the_measured_curve_is_the_table_of_the_benchmark() -> None:
    bundled = next(table for table in tables_of_quality() if table[0][1:3] == ["bits", "KL"])
    found = [row for row in bundled if re.fullmatch(r"ours fit to [\d.]+ bits, gptq", row[0])]
    assert sorted((float(row[1]), float(row[2])) for row in found) == list(MEASURED_KL)


def tables_of_quality() -> list[list[list[str]]]:
    return tables(QUALITY.read_text(encoding="utf-8"))


def test_losses_between_points_are_geometric_means_and_beyond_them_limits() -> None:
    for bits, measured in MEASURED_KL:
        kl, said = expected_kl(bits)
        assert kl == pytest.approx(measured)
        assert said == "about"
    for (fewer, worse), (more, better) in pairwise(MEASURED_KL):
        assert expected_kl((fewer + more) / 2)[0] == pytest.approx(math.sqrt(worse * better))
    for bits, measured, words in ((2.0, 0.17268, "more than"), (6.0, 0.00536, "less than")):
        kl, said = expected_kl(bits)
        assert kl == pytest.approx(measured)
        assert said == words


def test_a_streamed_recipe_is_as_fast_as_info_memory_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups of 64, which ``--memory`` plans for, it is the same number; of the smallest model it is more."""
    chips = find_chips("M4")
    smaller = recipes_for(EIGHT, chips)[MAC_MEMORY_GIB.index(16)]
    monkeypatch.setattr(recipes, "FEWEST", QuantizationSpec(2, 64))
    recipe = recipes_for(EIGHT, chips)[MAC_MEMORY_GIB.index(16)]
    assert recipe["memory"] == "11GB"
    planned = shape_plans("8x7b", recipe["memory"], CONTEXT_TOKENS, chips, None)[0]
    assert planned["model"] == "2-bit"
    assert recipe["tok_s"] == {"M4": planned["predicted_tok_s"]}
    assert smaller["tok_s"]["M4"] > recipe["tok_s"]["M4"]


def test_a_mac_too_small_to_stream_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "MAC_MEMORY_GIB", (2,))
    (recipe,) = recipes_for(BUILT_IN["8x22b"], (Chip("M4", 120),))
    assert (recipe["kind"], recipe["tok_s"]) == ("streamed", {"M4": None})


def test_each_mac_has_chips_there_are_slowest_first() -> None:
    assert sorted(RECIPE_CHIPS) == sorted(MAC_MEMORY_GIB)
    speeds = {chip.name: chip.bandwidth_gb_s for chip in CHIPS}
    for names in RECIPE_CHIPS.values():
        assert [speeds[name] for name in names] == sorted(speeds[name] for name in names)
