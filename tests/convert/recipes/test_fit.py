"""Fitting a size: within it, near the best there is, alike where the runtime fuses, the same every time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.machine.device import Device
from mlx_mixtral.sizes import parse_size
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.calibration.sensitivity import CANDIDATES, candidates_for, group_of
from mlx_mixtral_convert.recipes.defaults import default_losses
from mlx_mixtral_convert.recipes.fit import _choices, fit, predicted_kl
from mlx_mixtral_convert.recipes.machine import WORKING_BYTES, room_for_weights
from tests.convert.support import CONFIG, dense_config, hashes, make_checkpoint

MIXTRAL = MixtralConfig.from_hf(CONFIG)
EIGHT = MixtralConfig.from_hf(
    CONFIG
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    }
)  # fmt: skip


def random_losses(config: MixtralConfig, seed: int) -> dict[str, dict[str, float]]:
    random, losses = np.random.default_rng(seed), {}
    for matrix in matrices(config):
        if (name := group_of(matrix)) is not None:
            weight = float(random.lognormal(0, 2))
            losses[name] = {
                str(spec): weight * 4.0**-spec.bits * (spec.group_size / 64) ** 0.25 * float(random.uniform(0.8, 1.2))
                for spec in candidates_for(matrix.in_features)
            }
    return losses


@pytest.mark.parametrize("seed", range(6))
def test_it_is_within_a_percent_of_the_best_by_exhaustive_search(seed: int) -> None:
    config = MixtralConfig.from_hf(CONFIG | {"num_hidden_layers": 1})
    losses = random_losses(config, seed)
    groups: dict[str, list[object]] = {}
    for matrix in matrices(config):
        if (name := group_of(matrix)) is not None:
            groups.setdefault(name, []).append(matrix)
    choices = [_choices(group, losses[name], 2, 1) for name, group in groups.items()]  # type: ignore[arg-type]
    fixed = 2 * (4 * 128 + 3 * 128)
    # Every assignment, by dynamic programming over exact byte counts: a front of undominated (bytes, loss).
    front = [(0, 0.0)]
    for options in choices:
        sums = sorted((a + c.nbytes, b + c.loss) for (a, b), c in itertools.product(front, options))
        front = []
        for nbytes, loss in sums:
            if not front or loss < front[-1][1]:
                front.append((nbytes, loss))
    for share in (0.02, 0.2, 0.5, 0.8):
        room = front[0][0] + int(share * (front[-1][0] - front[0][0]))
        best = [loss for nbytes, loss in front if nbytes <= room][-1]
        found = fit(config, room + fixed, losses)
        assert found.data_bytes <= room + fixed
        assert found.loss <= best * 1.01 + 1e-9
        assert found.loss >= best * (1 - 1e-9)


@pytest.mark.parametrize("size", ["330kB", "400kB", "500kB", "800kB"])
def test_files_are_within_the_size_and_use_it(tmp_path: Path, size: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    report = convert(source, tmp_path / "out", fit=size, recipe=Recipe(rounding="search"))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == report.output_bytes <= parse_size(size)
    assert written > 0.85 * parse_size(size)
    recorded = json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]
    assert Recipe.from_dict(recorded).rounding == "search"


def test_fused_matrices_stay_alike_and_routers_unpacked() -> None:
    found = fit(MIXTRAL, 400_000, random_losses(MIXTRAL, 3)).recipe.assign(MIXTRAL)
    for layer in range(2):
        path = f"model.layers.{layer}"
        assert len({found[f"{path}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        experts = f"{path}.block_sparse_moe.switch_mlp"
        assert found[f"{experts}.gate_proj"] == found[f"{experts}.up_proj"]
        assert found[f"{path}.block_sparse_moe.gate"] is None


def test_more_room_never_costs_quality_and_all_the_room_means_no_packing() -> None:
    losses = random_losses(MIXTRAL, 1)
    fitted = [fit(MIXTRAL, size, losses).loss for size in range(260_000, 1_500_000, 100_000)]
    assert all(after <= before * 1.05 for before, after in itertools.pairwise(fitted))
    assert set(fit(MIXTRAL, 10**9, losses).recipe.assign(MIXTRAL).values()) == {None}


@pytest.mark.parametrize(
    ("size", "least_trunk", "experts"), [(20 * 10**9, 5.0, (2.9, 3.6)), (26 * 10**9, 5.0, (3.8, 4.6))]
)
def test_without_calibration_mixtral_spends_bits_on_the_trunk(
    size: int, least_trunk: float, experts: tuple[float, float]
) -> None:
    found = fit(EIGHT, size)
    assigned = found.recipe.assign(EIGHT)
    bits: dict[str, list[tuple[int, float]]] = {"expert": [], "attention": []}
    for matrix in matrices(EIGHT):
        if matrix.part in bits:
            spec = assigned[matrix.path]
            bits[matrix.part].append((matrix.parameters, 16.0 if spec is None else spec.bits + 32 / spec.group_size))
    mean = {part: sum(n * b for n, b in all_) / sum(n for n, _ in all_) for part, all_ in bits.items()}
    assert mean["attention"] >= least_trunk
    assert experts[0] <= mean["expert"] <= experts[1]
    assert 0.98 * size < found.data_bytes <= size


@pytest.mark.parametrize(("bits", "fewest"), [(2.1, 1), (2.2, 1), (2.27, 2), (2.4, 2), (3, 2)])
def test_without_calibration_a_matrix_has_one_bit_only_where_two_do_not_fit(bits: float, fewest: int) -> None:
    weights = sum(matrix.parameters for matrix in matrices(EIGHT))
    found = fit(EIGHT, int(bits * weights / 8))
    specs = {path: spec for path, spec in found.recipe.assign(EIGHT).items() if spec is not None}
    assert min(spec.bits for spec in specs.values()) == fewest
    assert all("switch_mlp" in path for path, spec in specs.items() if spec.bits == 1)
    assert 0.99 * bits < 8 * found.data_bytes / weights <= bits


def test_a_size_too_small_names_the_smallest_which_then_works(tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="the smallest it can be is") as caught:
        fit(EIGHT, 10**9)
    named = str(caught.value).partition("smallest it can be is ")[2].partition(",")[0]
    assert fit(EIGHT, parse_size(named)).data_bytes <= parse_size(named)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_size_named_counts_headers_and_scales_and_works_for_a_conversion(tmp_path: Path, dtype: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(MemoryBudgetError, match="the smallest it can be is") as caught:
        convert(source, tmp_path / "out", fit="100kB", dtype=dtype)
    named = str(caught.value).partition("smallest it can be is ")[2].partition(",")[0]
    assert convert(source, tmp_path / "out", fit=named, dtype=dtype).output_bytes <= parse_size(named)


def test_two_fits_are_the_same_bytes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    for name in "ab":
        convert(source, tmp_path / name, fit=400_000)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_predicted_loss_is_what_the_fit_minimised() -> None:
    losses = random_losses(MIXTRAL, 5)
    found = fit(MIXTRAL, 400_000, losses)
    assert predicted_kl(MIXTRAL, found.recipe.assign(MIXTRAL), losses) == pytest.approx(found.loss)
    assert predicted_kl(MIXTRAL, Recipe(5, 32).assign(MIXTRAL), losses) is None


def test_dense_models_and_narrow_rows_are_fitted_too() -> None:
    dense = MixtralConfig.from_hf(CONFIG | dense_config())
    assert fit(dense, 300_000).data_bytes <= 300_000
    narrow = MixtralConfig.from_hf(CONFIG | {"intermediate_size": 96})
    specs = {spec for spec in fit(narrow, 300_000).recipe.assign(narrow).values() if spec}
    assert specs
    assert candidates_for(96)
    assert all(spec.group_size == 32 for spec in candidates_for(96))
    assert candidates_for(80) == []
    assert [str(spec) for spec in candidates_for(192)][:2] == ["1-bit g64", "2-bit g64"]
    assert [str(spec) for spec in candidates_for(256)][:2] == ["1-bit g128", "2-bit g128"]
    undivided = MixtralConfig.from_hf(CONFIG | {"intermediate_size": 344})
    assigned = fit(undivided, 1_200_000).recipe.assign(undivided)
    assert {path.rpartition(".")[2] for path, spec in assigned.items() if spec is None} >= {"down_proj", "gate"}
    assert any(assigned.values())


def test_built_in_losses_know_every_candidate() -> None:
    losses = default_losses(EIGHT)
    assert all(set(found) == {str(spec) for spec in CANDIDATES} for found in losses.values())
    assert sum(
        found["2-bit g64"] for name, found in losses.items() if "gate_up" in name or "down" in name
    ) == pytest.approx(0.25)


def test_room_on_a_mac_is_its_memory_less_the_cache() -> None:
    mac = Device("metal", "Apple M2", "applegpu_g14s", 32 * 2**30, 22_906_503_168)
    assert room_for_weights(EIGHT, mac) == 22_906_503_168 - 4096 * 131072 - WORKING_BYTES
    assert room_for_weights(EIGHT, mac, 32768) == room_for_weights(EIGHT, mac) - (32768 - 4096) * 131072
    with pytest.raises(InvalidRequestError, match="this is not one; give a size"):
        room_for_weights(EIGHT, Device("cpu", "CPU", ""))
    with pytest.raises(InvalidRequestError, match="context is 99999"):
        room_for_weights(EIGHT, mac, 99999)
    with pytest.raises(InvalidRequestError, match="context is '4k', of type str"):
        room_for_weights(EIGHT, mac, "4k")  # type: ignore[arg-type]
    with pytest.raises(MemoryBudgetError, match="smaller --context"):
        room_for_weights(EIGHT, Device("metal", "", "applegpu_g14s", 2**30, 2**30), 32768)


def test_asking_what_fits_gives_no_bit_that_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size given does, and the one that the refusal advises has two bits throughout."""
    source = make_checkpoint(tmp_path / "source")
    sizes = (convert(source, tmp_path / "out", recipe=Recipe(bits, 128), dry_run=True).output_bytes for bits in (1, 2))
    between = sum(sizes) // 2
    monkeypatch.setattr("mlx_mixtral_convert.conversion.room_for_weights", lambda *_: between)
    with pytest.raises(MemoryBudgetError, match=r"at 2\.\d\d bits per weight; with --fit \S+B experts") as caught:
        convert(source, tmp_path / "out", fit="mac", dry_run=True)
    advised = str(caught.value).partition("--fit ")[2].split()[0]
    for size, has_one in ((between, True), (advised, False)):
        convert(source, tmp_path / str(size), fit=size)
        assert ('"bits": 1,' in (tmp_path / str(size) / "config.json").read_text()) == has_one
