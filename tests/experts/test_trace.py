"""Traces: files, and the one-pass curves of hit rates against plain simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MixtralError
from mlx_mixtral.experts import trace as trace_module
from mlx_mixtral.experts.policy import POLICIES
from mlx_mixtral.experts.trace import (
    FORMAT,
    PUBLISHED_REPEATS,
    RoutingTrace,
    chance_of_repeat,
    hit_rates,
    published_trace,
    simulate,
)


def random_trace(seed: int, tokens: int, layers: int, num_experts: int, per_token: int) -> RoutingTrace:
    order = np.random.default_rng(seed).random((tokens, layers, num_experts)).argsort(axis=2)
    return RoutingTrace(order[..., :per_token].astype(np.uint16), num_experts)


def test_a_bank_serves_what_it_holds() -> None:
    choices = np.array([[0, 1], [1, 2], [3, 1], [0, 3], [2, 1]], np.uint16)
    #  held with 3 slots:   01      012     123     130     132 -> 2 was given up for 0, 0 for 2
    assert simulate(choices, 4, 3) == (4, 6)
    assert simulate(choices, 4, 4) == (6, 4)
    assert simulate(choices, 4, 2) == (3, 7)


def test_no_expert_needed_now_makes_room_for_another() -> None:
    # 0 is the least recently used when 2 is needed beside it: 1 has to go.
    assert simulate(np.array([[0, 1], [2, 0], [0, 1]], np.uint16), 3, 2) == (2, 4)


@pytest.mark.parametrize("slots", [1, 5])
def test_slots_that_cannot_hold_a_token_or_are_too_many_are_refused(slots: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{slots} slots"):
        simulate(np.array([[0, 1]], np.uint16), 4, slots)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 9), st.data())
def test_one_pass_counts_what_simulation_counts(seed: int, tokens: int, num_experts: int, data: st.DataObject) -> None:
    per_token = data.draw(st.integers(1, num_experts))
    made = random_trace(seed, tokens, 2, num_experts, per_token)
    rates = hit_rates(made)
    for layer in range(2):
        for slots in range(per_token, num_experts):
            hits, misses = simulate(made.experts[:, layer], num_experts, slots)
            assert rates[layer, slots] == pytest.approx(hits / (hits + misses), abs=1e-12)


def test_one_pass_goes_on_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_trace(1, 100, 2, 8, 2)
    whole = hit_rates(made)
    monkeypatch.setattr(trace_module, "BLOCK_TOKENS", 7)
    np.testing.assert_array_equal(hit_rates(made), whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_curves_start_at_nothing_end_at_everything_and_rise(policy: str) -> None:
    rates = hit_rates(published_trace(3, 8, 2, tokens=300), policy)
    assert rates.shape == (3, 9)
    assert (rates[:, :2] == 0).all()
    assert (rates[:, 8] == 1).all()
    assert (np.diff(rates, axis=1) >= -0.02).all()


def test_lfu_curves_are_simulated() -> None:
    made = published_trace(2, 8, 2, tokens=200)
    assert hit_rates(made, "lfu")[1, 5] == simulate(made.experts[:, 1], 8, 5, "lfu").hits / 400


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="use one of lru, lfu"):
        hit_rates(published_trace(1, 8, 2, tokens=4), "random")


def test_one_pass_of_lru_simulates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_trace(0, 5000, 32, 8, 2)
    monkeypatch.delattr(trace_module, "simulate")
    assert hit_rates(made)[:, 4].mean() == pytest.approx(0.5, abs=0.01)


def test_published_traces_repeat_experts_as_published() -> None:
    made = published_trace(32, 8, 2, tokens=10_000)
    for depth, rate in PUBLISHED_REPEATS.items():
        assert made.repeat_rates[round(depth * 31)] == pytest.approx(rate, abs=0.01)
    assert made.repeat_rates[7] == pytest.approx(0.4804 + (0.6369 - 0.4804) * 7 / 15, abs=0.01)


def test_published_traces_have_no_favourites() -> None:
    made = published_trace(2, 8, 2, tokens=10_000, seed=3)
    shares = np.bincount(made.experts[:, 1].reshape(-1), minlength=8) / 20_000
    np.testing.assert_allclose(shares, 1 / 8, atol=0.01)


@pytest.mark.parametrize(("num_experts", "per_token"), [(8, 1), (4, 2), (16, 4), (2, 2), (1, 1)])
def test_other_models_never_repeat_less_than_chance(num_experts: int, per_token: int) -> None:
    made = published_trace(3, num_experts, per_token, tokens=8000)
    chance = chance_of_repeat(num_experts, per_token)
    assert (made.repeat_rates >= chance - 0.015).all()
    keeping = (0.6369 - chance_of_repeat(8, 2)) / (1 - chance_of_repeat(8, 2))
    assert made.repeat_rates[1] == pytest.approx(chance + keeping * (1 - chance), abs=0.02)


def test_chance_of_repeat_is_the_papers() -> None:
    assert chance_of_repeat(8, 2) == pytest.approx(0.464, abs=5e-4)
    assert chance_of_repeat(8, 1) == 0.125


def test_published_traces_follow_their_seed() -> None:
    first, again, other = (published_trace(2, 8, 2, tokens=50, seed=seed).experts for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_repeats_are_not_counted_from_text_to_text() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[1, 3]], [[0, 3]]], np.uint16)
    assert RoutingTrace(experts, 4).repeat_rates == [1.0]
    experts[2] = [[3, 0]]
    assert RoutingTrace(experts, 4).repeat_rates == pytest.approx(2 / 3)
    assert RoutingTrace(experts, 4, (0, 2)).repeat_rates == [1.0]
    assert RoutingTrace(experts[:1], 4).repeat_rates == [0.0]


def test_a_saved_trace_comes_back_and_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = RoutingTrace(published_trace(2, 8, 2, tokens=30).experts, 8, (10, 20))
    made.save(tmp_path / "a.safetensors")
    RoutingTrace.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = RoutingTrace.load(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(loaded.experts, made.experts)
    assert (loaded.num_experts, loaded.starts) == (8, (10, 20))


def test_a_trace_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        published_trace(1, 8, 2, tokens=2).save(tmp_path / "no" / "such.safetensors")


GOOD = np.array([[[0, 1]], [[2, 1]]], np.uint16)


@pytest.mark.parametrize(
    ("experts", "num_experts", "starts", "message"),
    [
        (GOOD.astype(np.int32), 4, (), "uint16"),
        (GOOD[0], 4, (), "uint16"),
        (GOOD[:0], 4, (), "uint16"),
        (GOOD, 2, (), "names expert 2"),
        (GOOD, 1, (), "cannot have 1 experts"),
        (GOOD, 10**6, (), "at most 256"),
        (GOOD[:, :, [0, 0]], 4, (), "chose one expert twice"),
        (GOOD, 4, (1, 1), "must ascend"),
        (GOOD, 4, (2,), "must ascend within the 2 tokens"),
        (GOOD, 4, (-1,), "must ascend"),
    ],
)
def test_what_is_no_trace_is_refused(
    experts: npt.NDArray[Any], num_experts: int, starts: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        RoutingTrace(experts, num_experts, starts)
    path = tmp_path / "trace.safetensors"
    arrays = {"experts": np.ascontiguousarray(experts), "starts": np.array(starts, np.int64)}
    save_file(arrays, path, {FORMAT: json.dumps({"num_experts": num_experts})})
    with pytest.raises(CheckpointError, match=message) as caught:
        RoutingTrace.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {}),
        ({"experts": GOOD}, {FORMAT: '{"num_experts": 4}'}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64), "more": GOOD}, {FORMAT: '{"num_experts": 4}'}),
        ({"experts": GOOD, "starts": np.zeros(1, np.float32)}, {FORMAT: '{"num_experts": 4}'}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {FORMAT: "[]"}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {FORMAT: "{"}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {FORMAT: "{}"}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {FORMAT: '{"num_experts": "4"}'}),
        ({"experts": GOOD, "starts": np.zeros(0, np.int64)}, {FORMAT: "[" * 100_000}),
    ],
)
def test_files_of_something_else_are_refused(
    arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str], tmp_path: Path
) -> None:
    save_file(arrays, tmp_path / "other.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        RoutingTrace.load(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def test_missing_damaged_and_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        RoutingTrace.load(path)
    RoutingTrace(GOOD, 4).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:5], whole[:-1], b"\xff" * 40, whole.replace(b"U16", b"I99")):
        path.write_bytes(damaged)
        with pytest.raises(MixtralError):
            RoutingTrace.load(path)
    path.write_bytes(whole)
    monkeypatch.setattr(trace_module, "MAX_FILE_BYTES", len(whole) - 1)
    with pytest.raises(CheckpointError, match="no file of its kind has more"):
        RoutingTrace.load(path)
