"""Recipes: what each module gets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import QuantizationSpec
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral_convert import Recipe
from tests.convert.support import CONFIG, dense_config

MIXTRAL = MixtralConfig.from_hf(CONFIG)
ROUTER = "model.layers.0.block_sparse_moe.gate"


def test_everything_is_packed_but_the_router() -> None:
    assigned = Recipe().assign(MIXTRAL)
    assert len(assigned) == 2 + 2 * (4 + 1 + 3)
    assert {path for path, spec in assigned.items() if spec is None} == {
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.1.block_sparse_moe.gate",
    }
    assert set(assigned.values()) == {QuantizationSpec(4, 64), None}


def test_no_bits_means_nothing_is_packed() -> None:
    assert set(Recipe(None).assign(MIXTRAL).values()) == {None}
    assert set(Recipe(4).assign(MixtralConfig.from_hf(CONFIG | dense_config())).values()) == {QuantizationSpec(4, 64)}


def test_the_last_override_that_matches_wins() -> None:
    recipe = Recipe(
        4, 32, overrides={"model.layers.0.*": {"bits": 6}, "*.v_proj": {"bits": 8, "group_size": 64}, "*.gate": None}
    )
    assigned = recipe.assign(MIXTRAL)
    assert assigned["model.layers.0.self_attn.q_proj"] == QuantizationSpec(6, 32)
    assert assigned["model.layers.0.self_attn.v_proj"] == QuantizationSpec(8, 64)
    assert assigned["model.layers.1.self_attn.v_proj"] == QuantizationSpec(8, 64)
    assert assigned["model.layers.1.self_attn.q_proj"] == QuantizationSpec(4, 32)
    assert assigned[ROUTER] is None


@pytest.mark.parametrize(
    ("recipe", "value", "expected"),
    [
        (Recipe(4, 32), {"bits": 8}, QuantizationSpec(8, 32)),
        (Recipe(4, 32), {"mode": "mxfp4"}, QuantizationSpec(4, 32, "mxfp4")),
        (Recipe(mode="mxfp4"), {"bits": 6}, QuantizationSpec(6, 64)),
        (Recipe(mode="mxfp4"), {"group_size": 128}, QuantizationSpec(4, 128)),
        (Recipe(mode="nvfp4"), {"mode": "mxfp8"}, QuantizationSpec(8, 32, "mxfp8")),
        (Recipe(None), {}, QuantizationSpec(4, 64)),
        (Recipe(3, 128), QuantizationSpec(5, 32), QuantizationSpec(5, 32)),
        (Recipe(3, 128), False, None),
    ],
)
def test_an_override_inherits_what_it_leaves_out(recipe: Recipe, value: Any, expected: QuantizationSpec | None) -> None:
    changed = Recipe(recipe.bits, recipe.group_size, recipe.mode, {"lm_head": value})
    assert changed.assign(MIXTRAL)["lm_head"] == expected


def test_a_mode_brings_its_own_bits() -> None:
    assert Recipe(mode="mxfp8").default == QuantizationSpec(8, 32, "mxfp8")
    assert Recipe(None, mode="mxfp8").default is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_router_never_gets_fewer_than_8_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"'\*\.block_sparse_moe\.\*'.*{ROUTER} {bits} bits; it needs at least 8"):
        Recipe(overrides={"*.block_sparse_moe.*": {"bits": bits}}).assign(MIXTRAL)
    assert Recipe(overrides={"*.gate": {"bits": 8}}).assign(MIXTRAL)[ROUTER] == QuantizationSpec(8, 64)


def test_a_group_that_does_not_divide_is_named_with_the_ones_that_do() -> None:
    config = MixtralConfig.from_hf(CONFIG | {"intermediate_size": 96})
    with pytest.raises(
        ConfigError, match=r"down_proj: rows of 96 do not divide into groups of 64; use a group size of 32"
    ):
        Recipe(4, 64).assign(config)
    Recipe(4, 64, overrides={"*.down_proj": {"group_size": 32}}).assign(config)


@pytest.mark.parametrize("recipe", [Recipe(4, 64), Recipe(1, 128), Recipe(mode="mxfp4"), Recipe(mode="nvfp4")])
def test_a_width_that_no_group_divides_is_left_out(recipe: Recipe) -> None:
    config = MixtralConfig.from_hf(CONFIG | {"intermediate_size": 344})
    assigned = recipe.assign(config)
    whole = {path for path, spec in assigned.items() if spec is None and not path.endswith(".gate")}
    assert whole == {path for path in assigned if path.endswith("down_proj")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "7 bits are not supported"),
        ({"group_size": 48}, "group size 48 is not supported"),
        ({"mode": "int4"}, "mode 'int4' is unknown"),
        ({"mode": "mxfp4", "bits": 8}, "mxfp4 means 4 bits"),
        ({"bits": None, "mode": "int4"}, "mode 'int4' is unknown"),
        ({"overrides": {"lm_head": {"bits": 9}}}, "override 'lm_head': 9 bits are not supported"),
        ({"overrides": {"lm_head": {"bit": 8}}}, "override 'lm_head' has 'bit'"),
        ({"overrides": {"lm_head": True}}, "override 'lm_head' is True"),
        ({"overrides": {"lm_head": 8}}, "override 'lm_head' is 8"),
    ],
)
def test_bad_recipes_are_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**arguments)


def test_an_override_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'\*\.attn\.\*' matches no module"):
        Recipe(overrides={"*.attn.*": {"bits": 8}}).assign(MIXTRAL)


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe(3, 32, overrides={"*.v_proj": QuantizationSpec(6, 32), "lm_head": None})
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    read = Recipe.from_file(path)
    assert read.assign(MIXTRAL) == recipe.assign(MIXTRAL)
    assert read.to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"bit": 4}', ConfigError, "'bit' is not known"),
        ('{"bits": "4"}', ConfigError, "bits is '4', not an integer"),
        ('{"bits": true}', ConfigError, "bits is True, not an integer"),
        ('{"overrides": []}', ConfigError, "overrides is"),
        ('{"mode": 4}', ConfigError, "mode is 4, not a name"),
        ("[]", CheckpointError, "JSON list"),
        ("{", CheckpointError, "not valid JSON"),
    ],
)
def test_bad_recipe_files_are_named(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        Recipe.from_file(path)
    assert str(path) in str(caught.value)
