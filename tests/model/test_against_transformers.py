"""The network against outputs recorded from transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from tests.conftest import read_npz

RECORDED = Path(__file__).parents[1] / "goldens" / "transformers"
CASES = sorted(path.name for path in RECORDED.iterdir() if path.is_dir())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_recorded_ones(case: str) -> None:
    recorded = read_npz(RECORDED / case / "reference.npz")
    with load(RECORDED / case) as model:
        logits = np.asarray(model.module(mx.array(recorded["ids"])))
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-4, rtol=0)


def test_every_case_that_was_asked_for_is_recorded() -> None:
    wanted = {
        "head_dim", "sliding_window", "rope_theta", "rope_linear_legacy", "rope_yarn", "tied_embeddings", "top1_of_4",
        "top3_of_8", "mistral", "llama", "one_kv_head", "full_kv_heads", "base_8x2", "fused", "sharded",
    }  # fmt: skip
    assert wanted <= set(CASES)


def test_bundled_checkpoint_equals_the_reference(model: Mixtral, recorded: dict[str, np.ndarray[Any, Any]]) -> None:
    logits = np.asarray(model.module(mx.array(recorded["ids"])))
    assert np.abs(logits - recorded["logits"]).max() <= 2e-4


def test_router_equals_the_reference(model: Mixtral, recorded: dict[str, np.ndarray[Any, Any]]) -> None:
    """Not only the sum: each layer's router sees what the reference's router sees."""
    seen: list[mx.array] = []
    module = model.module
    routers = [layer.moe.gate for layer in module.layers]
    try:
        for layer in module.layers:
            gate = layer.moe.gate

            def spy(x: mx.array, choice: None, gate: Any = gate) -> mx.array:
                seen.append(gate(x))
                return seen[-1]

            layer.moe.gate = spy
        mx.eval(module(mx.array(recorded["ids"])))
    finally:
        for layer, gate in zip(module.layers, routers, strict=True):
            layer.moe.gate = gate
    ours = np.stack([np.asarray(logits) for logits in seen], axis=1)
    np.testing.assert_allclose(ours, recorded["router_logits"], atol=2e-4)


def test_greedy_text_equals_the_reference(model: Mixtral) -> None:
    greedy = json.loads((RECORDED.parent / "tiny-mixtral" / "reference_greedy.json").read_text())
    for domain, record in greedy.items():
        out = model.generate(record["prompt_ids"], max_tokens=len(record["greedy_ids"]))
        assert list(out.token_ids) == record["greedy_ids"], domain
