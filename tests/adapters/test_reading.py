"""Opening adapters: spellings of names, scales, notes, fingerprints, and when numbers are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral.adapters.adapter import Adapter, LowRank
from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.adapters.peft_patterns import Patterns
from mlx_mixtral.errors import ClosedError, NonFiniteWeightsError

from .goldens import adapter_folder
from .test_refusals import Q, changed, config_of, filled, set_to, unset

Q_PATH = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"


def everything(adapter: Adapter) -> dict[str, Any]:
    """Every array of an adapter by what it is of."""
    found: dict[str, Any] = {path: adapter.replacement(path) for path in adapter.replaced}
    for path in adapter.token_rows:
        found[f"{path} rows"] = adapter.rows(path).rows
    for path in adapter.ranks:
        for expert in (None, 0, 1, 2, 3):
            if (change := adapter.low_rank(path, expert)) is not None:
                found |= {f"{path} {expert} {name}": value for name, value in vars(change).items() if value is not None}
    return found


def opened(kind: str, **options: Any) -> Adapter:
    return open_adapter(adapter_folder(kind), config_of(kind), **options)


def low_rank(adapter: Adapter, path: str, expert: int | None = None) -> LowRank:
    change = adapter.low_rank(path, expert)
    assert change is not None
    return change


SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name in its keys": lambda name: (
        name.replace(".weight", ".default.weight")
        .replace(".bias", ".default.bias")
        .replace("_vector", "_vector.default.weight")
    ),
    "modules to save by their name": lambda name: (
        name.replace(".weight", ".modules_to_save.default.weight")
        if not ("lora_" in name or "base_layer" in name)
        else name
    ),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "a base without its head": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "compiled and sharded": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn").replace(
        "base_model.model.", "base_model.model._orig_mod.", 1
    ),
    "transformers 5's blocks": lambda name: name.replace("block_sparse_moe", "mlp"),
    "projections by their meaning": lambda name: (
        name.replace(".w1.", ".gate_proj.").replace(".w2.", ".down_proj.").replace(".w3.", ".up_proj.")
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["v4-experts", "v4-saved", "v4-dora", "v4-bias", "v4-embedding", "v4-tokens"])
def test_names_are_read_in_every_spelling(kind: str, spelling: str, tmp_path: Path) -> None:
    def respell(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        renamed = {SPELLINGS[spelling](name): value for name, value in tensors.items()}
        if spelling == "the adapter's name in its keys":
            renamed = {
                name.replace(".default.weight", ".weight") if "lora_" not in name else name: value
                for name, value in renamed.items()
            }
        tensors.clear()
        tensors.update(renamed)

    expected = everything(opened(kind))
    found = everything(open_adapter(changed(kind, tmp_path, respell), config_of(kind)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_scale_multiplies_what_is_added_and_nothing_else() -> None:
    for kind, path, expert in (("v4-dora", Q_PATH, None), ("v4-bias", Q_PATH, None), ("mlx-lora", UP, 2)):
        plain, turned = low_rank(opened(kind), path, expert), low_rank(opened(kind, scale=-0.5), path, expert)
        assert np.array_equal(turned.a, plain.a)
        assert np.array_equal(turned.b, plain.b * np.float32(-0.5))
        if plain.magnitude is not None and turned.magnitude is not None:
            assert np.array_equal(turned.magnitude, plain.magnitude)
        if plain.bias is not None and turned.bias is not None:
            assert np.array_equal(turned.bias, plain.bias * np.float32(-0.5))
    assert not low_rank(opened("v4-experts", scale=0), Q_PATH).b.any()


def test_other_matrices_and_experts_have_no_change() -> None:
    adapter = opened("v4-some-experts")
    path = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
    assert adapter.ranks == {path: 4, path.replace("gate_proj", "down_proj"): 4}
    assert [adapter.low_rank(path, expert) is not None for expert in range(4)] == [True, False, True, False]
    assert adapter.low_rank(UP, 0) is None


def test_stacks_of_one_file_tell_how_the_others_lie(tmp_path: Path) -> None:
    """Only ``gate_up_proj`` shows that it is transposed where both widths are the same."""
    kind = "old-stacks-square"
    expected = everything(opened(kind))
    for name, change in (("said", set_to(peft_version="0.19.0")), ("unsaid", unset("peft_version"))):
        found = everything(open_adapter(changed(kind, tmp_path / name, change), config_of(kind)))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_notes_say_what_is_of_no_consequence(tmp_path: Path) -> None:
    settings = set_to(
        lora_dropout=0.1,
        target_modules=["q_proj", "w1", "self_attn.q_proj", "gate_proj"],
        base_model_name_or_path="owner/base",
    )
    adapter = open_adapter(changed("v4-experts", tmp_path, settings), config_of("v4-experts"))
    assert adapter.notes == (
        "dropout 0.1 is for training and ignored",
        "target_modules 'gate_proj' changed nothing where it was trained",
        "it was trained on owner/base",
    )
    assert "2 copies of the base model's own weights" in opened("v4-embedding").notes[-1]
    assert (adapter.name, adapter.kind, adapter.folder) == ("adapter", "PEFT", tmp_path / "adapter")


def test_the_fingerprint_is_of_numbers_and_their_meaning(tmp_path: Path) -> None:
    kind = "v4-experts"
    own = opened(kind).fingerprint
    assert len(own) == 64
    assert opened(kind, scale=2.0).fingerprint == own

    def of(name: str, change: Any) -> str:
        return open_adapter(changed(kind, tmp_path / name, change), config_of(kind)).fingerprint

    same = of("copied", lambda tensors, settings: None)
    assert of("noted", set_to(lora_dropout=0.3, base_model_name_or_path="other")) == same
    assert of("scaled", set_to(lora_alpha=7)) != same
    assert of("number", filled(f"{Q}.lora_A.weight", 0.5)) != same


def test_numbers_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    adapter = open_adapter(
        changed("v4-experts", tmp_path, filled(f"{Q}.lora_A.weight", np.nan)), config_of("v4-experts")
    )
    low_rank(adapter, UP, 1)
    with pytest.raises(NonFiniteWeightsError, match=r"q_proj\.lora_A\.weight' holds NaN"):
        adapter.low_rank(Q_PATH)
    adapter.close()
    with pytest.raises(ClosedError, match="the adapter adapter was closed"):
        adapter.low_rank(UP, 1)


@pytest.mark.parametrize(
    ("entries", "module", "value"),
    [
        ({"q_proj": 1}, "model.layers.0.self_attn.q_proj", 1),
        ({"proj": 1}, "model.layers.0.self_attn.q_proj", None),
        ({"layers.0.self_attn.q_proj": 1, "q_proj": 2}, "model.layers.0.self_attn.q_proj", 1),
        ({"q_proj": 2, "layers.0.self_attn.q_proj": 1}, "model.layers.0.self_attn.q_proj", 2),
        ({r".*\.q_proj": 3, "q_proj": 2}, "model.layers.0.self_attn.q_proj", 3),
        ({"q_proj": 2, r".*\.q_proj": 3}, "model.layers.0.self_attn.q_proj", 2),
        ({"^q_proj": 2, "v_proj": 3}, "model.layers.0.self_attn.q_proj", None),
        ({"(?:q|k)_proj": 4}, "model.layers.0.self_attn.k_proj", 4),
        ({r"layers\.[13]\..*": 5}, "model.layers.3.block_sparse_moe.gate", 5),
        ({r"layers\.[13]\..*": 5}, "model.layers.2.block_sparse_moe.gate", None),
    ],
)
def test_the_first_pattern_that_a_module_ends_in_counts(
    entries: dict[str, int], module: str, value: int | None
) -> None:
    """As ``peft.utils.other.get_pattern_key`` chose in peft 0.21.2, for the same table."""
    assert Patterns("here", entries).value(module) == value
