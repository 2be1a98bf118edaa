"""Routing and expert gathering against loops in numpy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.layers.expert_bank import ExpertBank
from mlx_mixtral.layers.linear import StackedLinear, gathers_sorted
from mlx_mixtral.model.moe import SparseMoe, route

Floats = np.ndarray[Any, Any]


def _bank(
    experts: int, hidden: int = 64, width: int = 96, spec: QuantizationSpec | None = None
) -> tuple[ExpertBank, Floats, Floats]:
    """A bank and its dense float32 weights ``[E, 2F, D]`` and ``[E, D, F]``."""
    generator = np.random.default_rng(experts)
    weights = [
        generator.standard_normal(shape).astype(np.float32) / 8
        for shape in ((experts, 2 * width, hidden), (experts, hidden, width))
    ]
    if spec is None:
        layers = [StackedLinear({"weight": mx.array(w)}, None) for w in weights]
        return ExpertBank(layers[:1], layers[1]), weights[0], weights[1]
    layers, dense = [], []
    for w in weights:
        packed = mx.quantize(mx.array(w), spec.group_size, spec.bits)
        layers.append(StackedLinear(dict(zip(("weight", "scales", "biases"), packed, strict=True)), spec))
        dense.append(np.asarray(mx.dequantize(*packed, group_size=spec.group_size, bits=spec.bits)))
    return ExpertBank(layers[:1], layers[1]), dense[0], dense[1]


def _expert(x: Floats, gate_up: Floats, down: Floats) -> Floats:
    gate, up = np.split(gate_up.astype(np.float64) @ x.astype(np.float64), 2)
    return down.astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)


@given(st.integers(1, 16).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_route_picks_the_largest_logits_and_normalises_over_them(shape: tuple[int, int], seed: int) -> None:
    experts, chosen = shape
    logits = np.random.default_rng(seed).standard_normal((3, 5, experts)).astype(np.float32) * 4
    selected, weights = (np.asarray(a) for a in route(mx.array(logits), chosen))
    for index in np.ndindex(3, 5):
        wanted = np.argsort(-logits[index])[:chosen]
        assert sorted(selected[index]) == sorted(wanted)
        full = np.exp(logits[index].astype(np.float64) - logits[index].max())
        cut = full[selected[index]] / full[selected[index]].sum()
        np.testing.assert_allclose(weights[index], cut, rtol=1e-5)


def test_route_takes_its_softmax_in_float32() -> None:
    logits = mx.array([[10.0, 9.984375, -5.0, -6.0]]).astype(mx.float16)
    selected, weights = route(logits, 2)
    assert weights.dtype == mx.float16
    first = float(weights[0, np.asarray(selected)[0].tolist().index(0)])
    assert abs(first - 1 / (1 + np.exp(-0.015625))) < 3e-4


@pytest.mark.parametrize("spec", [None, QuantizationSpec(4, 32)], ids=["unquantised", "4-bit"])
@pytest.mark.parametrize("tokens", [1, 3, 15, 16, 40])
def test_bank_equals_a_loop_over_tokens_and_experts(spec: QuantizationSpec | None, tokens: int) -> None:
    bank, gate_up, down = _bank(8, spec=spec)
    generator = np.random.default_rng(tokens)
    x = generator.standard_normal((1, tokens, 64)).astype(np.float32)
    slots = np.stack([generator.permutation(8)[:2] for _ in range(tokens)])[None]
    ours = np.asarray(bank(mx.array(x), mx.array(slots), 8))
    for token in range(tokens):
        for k in range(2):
            expert = slots[0, token, k]
            np.testing.assert_allclose(
                ours[0, token, k], _expert(x[0, token], gate_up[expert], down[expert]), atol=1e-4
            )


def test_many_tokens_are_sorted_and_few_are_not() -> None:
    """The threshold of MLX's grouped kernel, asked of the model's expert count."""
    assert not gathers_sorted(2, 8)
    assert not gathers_sorted(31, 8)
    assert gathers_sorted(32, 8)
    assert not gathers_sorted(15, 2)
    assert gathers_sorted(16, 2)


def test_sorted_indices_really_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Metal a false promise of sorted indices is a wrong answer; the CPU would not tell."""
    promised: list[Floats] = []
    plain = StackedLinear.__call__

    def spy(self: StackedLinear, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
        if is_sorted:
            promised.append(np.asarray(slots))
        return plain(self, x, slots, is_sorted=is_sorted)

    monkeypatch.setattr(StackedLinear, "__call__", spy)
    bank, _, _ = _bank(8)
    generator = np.random.default_rng(1)
    mx.eval(
        bank(
            mx.array(generator.standard_normal((2, 32, 64)).astype(np.float32)),
            mx.array(generator.integers(0, 8, (2, 32, 2))),
            8,
        )
    )
    assert len(promised) == 2
    assert all((np.diff(slots) >= 0).all() for slots in promised)


def test_each_token_uses_exactly_its_two_experts(model: Mixtral, recorded: dict[str, Floats]) -> None:
    """Section 2.1 of the paper: outputs of all other experts carry no weight, so poisoning them changes nothing."""
    moe: SparseMoe = model.module.layers[0].moe
    x = mx.array(np.random.default_rng(2).standard_normal((1, 1, 128)).astype(np.float32))
    zero = mx.zeros_like(x)
    before = np.asarray(moe(x, zero))
    used = set(np.asarray(route(moe.gate(x), 2)[0]).ravel().tolist())
    assert len(used) == 2
    gate_up, down = moe.experts.bank.gate_up[0], moe.experts.bank.down
    saved = gate_up.weight, down.weight
    try:
        keep = mx.array([e in used for e in range(8)])[:, None, None]
        gate_up.weight = mx.where(keep, saved[0], mx.nan)
        down.weight = mx.where(keep, saved[1], mx.nan)
        np.testing.assert_array_equal(np.asarray(moe(x, zero)), before)
        gate_up.weight = mx.where(keep, mx.nan, saved[0])
        assert np.isnan(np.asarray(moe(x, zero))).all()
    finally:
        gate_up.weight, down.weight = saved


def test_block_adds_the_weighted_sum_to_the_residual() -> None:
    bank, gate_up, down = _bank(4)
    from mlx_mixtral.layers.linear import Linear

    generator = np.random.default_rng(9)
    router = generator.standard_normal((4, 64)).astype(np.float32)
    gathered = GatheredExperts(0, 4, None, bank)  # type: ignore[arg-type]
    moe = SparseMoe(Linear({"weight": mx.array(router)}, None), gathered, 4, 3)
    x, residual = (generator.standard_normal((2, 9, 64)).astype(np.float32) for _ in "xr")
    ours = np.asarray(moe(mx.array(x), mx.array(residual)))
    for index in np.ndindex(2, 9):
        logits = router @ x[index]
        top = np.argsort(-logits)[:3]
        shares = np.exp(logits[top]) / np.exp(logits[top]).sum()
        wanted = residual[index] + sum(
            s * _expert(x[index], gate_up[e], down[e]) for s, e in zip(shares, top, strict=True)
        )
        np.testing.assert_allclose(ours[index], wanted, atol=1e-4)
