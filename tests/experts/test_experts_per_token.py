"""Another number of experts per token than the checkpoint's: the network of mlx-lm told the same, and budgets that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.budget.slots import min_expert_bytes
from mlx_mixtral.errors import InvalidRequestError, PromptCacheError
from mlx_mixtral.experts.trace import hit_rates
from mlx_mixtral.generation.speculation.cost import distinct_experts

from .support import bits, streamed

IDS = [1, *(int(i) for i in np.random.default_rng(3).integers(3, 256, 25))]
GOLDENS = Path(__file__).parents[1] / "goldens" / "transformers"


def _mlx_lm_logits(folder: Path, chosen: int) -> np.ndarray[Any, Any]:
    from mlx_lm.utils import load_model

    network, _ = load_model(folder, model_config={"num_experts_per_tok": chosen})
    network.set_dtype(mx.float32)
    return np.asarray(network(mx.array([IDS])))[0]


@pytest.mark.parametrize("chosen", [1, 2, 3, 8])
def test_logits_are_those_of_mlx_lm_with_as_many(short: Path, chosen: int) -> None:
    with load(short, experts_per_token=chosen) as model:
        np.testing.assert_allclose(np.asarray(model.logits(IDS)), _mlx_lm_logits(short, chosen), atol=2e-4, rtol=0)
        text = model.generate(IDS, max_tokens=6)
        # Steps and the prompt agree: each token is the likeliest after those before it.
        logits = np.asarray(model.logits([*IDS, *text.token_ids]))[len(IDS) - 1 : -1]
        assert list(text.token_ids) == logits.argmax(axis=-1).tolist()
    assert json.loads((short / "config.json").read_text())["num_experts_per_tok"] == 2


def test_logits_are_those_recorded_with_as_many(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "top3_of_8", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    with np.load(folder / "reference.npz") as recorded, load(folder, experts_per_token=3) as model:
        ours = np.asarray(model.module(mx.array(recorded["ids"])))
        np.testing.assert_allclose(ours, recorded["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chosen", [1, 3, 4])
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_streamed_experts_give_the_same_bits(small: Path, chosen: int, prefetch: str) -> None:
    with load(small, experts_per_token=chosen) as whole:
        wanted, text = bits(whole.logits(IDS)), whole.generate(IDS, max_tokens=12).token_ids
        least = whole.min_memory_bytes
    with load(small, memory=least, experts_per_token=chosen, prefetch=prefetch) as model:
        assert model.residency.is_streamed
        assert bits(model.logits(IDS)) == wanted
        out = model.generate(IDS, max_tokens=12)
        assert out.token_ids == text
        experts = out.stats.decode_experts
        assert experts is not None
        assert experts.hits + experts.misses == 11 * model.config.num_hidden_layers * chosen


def test_budgets_and_costs_are_of_as_many(small: Path) -> None:
    bytes_of: dict[int, int] = {}
    for chosen in (1, 2, 4):
        with load(small, experts_per_token=chosen) as model:
            sizes = model.residency.sizes
            assert sizes.num_experts_per_tok == chosen
            assert min_expert_bytes(sizes) == chosen * max(sizes.expert_bytes)
            bytes_of[chosen] = model.min_memory_bytes
            cost, per_byte = model.engine.forward_cost(), 1e-11
            trunk, expert = sizes.trunk_bytes, sum(sizes.expert_bytes)
            assert cost.seconds(1) == pytest.approx((trunk + chosen * expert) * per_byte)
            assert cost.expert_reads(64) == pytest.approx(distinct_experts(8, chosen, 64))
            assert model.routing_trace([IDS]).experts.shape == (len(IDS), 2, chosen)
    assert bytes_of[1] < bytes_of[2] < bytes_of[4]


def test_a_trace_of_more_experts_a_token_plans_for_fewer_by_its_first_choices(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    with load(folder, experts_per_token=3) as model:
        trace = model.routing_trace([list(range(5, 200))])
    trace.save(folder / "routing.trace")
    firsts = type(trace)(trace.experts[..., :1], trace.num_experts)
    with streamed(folder, 0.3) as model:
        assert model.engine.planner.hit_rates.shape == (2, 9)
    with load(folder, experts_per_token=1) as model:
        np.testing.assert_array_equal(model.engine.planner.hit_rates, hit_rates(firsts))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [(0, "at least 1"), (9, "this model has 8 experts: give 1 to 8"), (2.0, "at least 1"), (True, "at least 1")],
)
def test_a_number_there_are_not_is_refused(small: Path, chosen: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"experts_per_token is {chosen}; .*{said}"):
        load(small, experts_per_token=chosen)


def test_a_dense_model_has_none_to_choose() -> None:
    with pytest.raises(InvalidRequestError, match="experts_per_token is 2; this model is dense"):
        load(GOLDENS / "llama", experts_per_token=2)
    load(GOLDENS / "llama", experts_per_token=1).close()


def test_a_saved_prompt_is_of_one_number_and_one_rope(small: Path, tmp_path: Path) -> None:
    place, prompt = tmp_path / "prompt", list(range(5, 45))

    def reuses(model: Mixtral) -> bool:
        with model:
            assert model.load_prompt(place) == prompt
            return model.generate([*prompt, 7], max_tokens=1).stats.reused_tokens > len(prompt) - 2

    with load(small, experts_per_token=3, rope_scaling="yarn=2") as model:
        model.save_prompt(place, prompt)
    for given in ({}, {"experts_per_token": 3}, {"rope_scaling": "yarn=2"}):
        with load(small, **given) as model, pytest.raises(PromptCacheError, match=r"was made with .*experts_per_token"):
            model.load_prompt(place)
    other = load(small, experts_per_token=3, rope_scaling="yarn=2", rope_theta=1e5)
    with other, pytest.raises(PromptCacheError, match="load it with the same experts_per_token and rope"):
        other.load_prompt(place)
    assert reuses(load(small, experts_per_token=3, rope_scaling="yarn=2"))
    with load(small) as model:
        model.save_prompt(place, prompt)
    assert reuses(load(small, experts_per_token=2, rope_theta=1e6))
    with (
        load(small, rope_scaling="linear=2") as model,
        pytest.raises(PromptCacheError, match="checkpoint's own settings"),
    ):
        model.load_prompt(place)
