"""Rope scalings whose frequencies depend on the length: chunks, caches, batches and speculation leave no trace in the text.

Recorded from transformers, which computes a prompt in one forward and every row by itself: `greedy` of the goldens. What we
compute in pieces has to be that, past the context the model was trained with too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, PromptLookup, SamplingParams, load
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.generation.prefill import prefill
from tests.conftest import read_npz

RECORDED = Path(__file__).parents[1] / "goldens" / "transformers"
DYNAMIC, LONGROPE = RECORDED / "rope_dynamic_greedy", RECORDED / "rope_longrope_greedy"


@pytest.fixture(scope="module", params=[DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def stretched(request: pytest.FixtureRequest) -> Iterator[tuple[Mixtral, list[list[int]], list[list[int]]]]:
    """A model, prompts of 12 tokens, and what transformers continues them with, past the 16 tokens of training."""
    recorded = read_npz(request.param / "reference.npz")
    with load(request.param) as model:
        yield model, recorded["ids"][:, :12].tolist(), recorded["greedy"].tolist()


@pytest.mark.parametrize("speculation", [None, PromptLookup(max_ngram=1, adaptive=False)], ids=["plain", "lookup"])
def test_text_past_the_trained_context_equals_the_recorded_one(
    stretched: tuple[Mixtral, list[list[int]], list[list[int]]], speculation: PromptLookup | None
) -> None:
    model, prompts, wanted = stretched
    for prompt, text in zip(prompts, wanted, strict=True):
        out = model.generate(prompt, max_tokens=len(text), speculation=speculation)
        assert list(out.token_ids) == text


def test_rows_of_a_batch_do_not_stretch_each_other(
    stretched: tuple[Mixtral, list[list[int]], list[list[int]]],
) -> None:
    """Each has the frequencies of its own length, as it has alone."""
    model, prompts, wanted = stretched
    short = [prompts[0][:5], prompts[1][:7]]
    alone = [list(model.generate(prompt, max_tokens=len(wanted[0])).token_ids) for prompt in short]
    beside = model.generate_batch([*prompts, *short], max_tokens=len(wanted[0]))
    assert [list(out.token_ids) for out in beside] == [*wanted, *alone]
    within = model.generate_batch(short, max_tokens=6)
    assert [list(out.token_ids) for out in within] == [text[:6] for text in alone]


def test_chunks_of_a_prompt_are_turned_by_the_length_of_all_of_it(
    stretched: tuple[Mixtral, list[list[int]], list[list[int]]],
) -> None:
    model, _, _ = stretched
    folder = DYNAMIC if model.config.rope.kind == "dynamic" else LONGROPE
    recorded = read_npz(folder / "reference.npz")
    for chunk in (5, 16, 24):
        parts = prefill(model.module, mx.array(recorded["ids"]), model.make_cache(), chunk, first=0)
        logits = mx.concatenate([model.module.head(part.hidden) for part in parts if part.hidden is not None], axis=1)
        np.testing.assert_allclose(np.asarray(logits), recorded["logits"], atol=1e-4, rtol=0)


def test_a_kept_prefix_serves_no_sequence_of_another_table(
    stretched: tuple[Mixtral, list[list[int]], list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a long text left begins like a short one; its keys are turned otherwise."""
    monkeypatch.setattr("mlx_mixtral.cache.prefixes.MIN_TOKENS", 2)
    model, prompts, wanted = stretched
    recorded = read_npz((DYNAMIC if model.config.rope.kind == "dynamic" else LONGROPE) / "reference.npz")
    row = recorded["ids"][0].tolist()
    model.engine.prompt_cache.clear()
    model.generate(row, max_tokens=2)
    short = model.generate(prompts[0], max_tokens=len(wanted[0]))
    assert list(short.token_ids) == wanted[0]
    assert short.stats.reused_tokens == 0
    model.generate(prompts[0], max_tokens=1)
    long = model.generate(row, max_tokens=1)
    assert long.stats.reused_tokens == 0
    assert long.token_ids[0] == int(recorded["logits"][0, -1].argmax())
    with pytest.raises(InvalidRequestError, match=r"past 16 tokens .* depends on the length of the whole text"):
        model.save_prompt(tmp_path / "long", row)
    model.save_prompt(tmp_path / "short", prompts[1])
    model.load_prompt(tmp_path / "short")
    assert model.generate(prompts[1], max_tokens=2).stats.reused_tokens > 0


def test_the_limit_is_the_scaled_one_with_a_budget_and_without(tmp_path: Path) -> None:
    with load(DYNAMIC) as model:
        assert model.engine.context_limit == 64
        assert len(model.generate([1] * 60, max_tokens=100).token_ids) == 4
        with pytest.raises(ContextLengthError, match="has 64 tokens; the model's context holds 64"):
            model.generate([1] * 64, max_tokens=1)
    with load(DYNAMIC, memory="2MB", context=50) as model:
        assert model.engine.context_limit == 64  # whole steps of columns, no more than the model's own
    with pytest.raises(ContextLengthError, match=r"context is 65; the model's own is 64 tokens.*dynamic=5"):
        load(DYNAMIC, context=65)


@pytest.mark.parametrize(
    ("case", "scaling", "theta", "written"),
    [
        ("rope_linear_legacy", "linear=4", 1e4, {"max_position_embeddings": 16}),
        ("rope_yarn", "yarn=4", 20.0, {"max_position_embeddings": 16}),
        ("rope_dynamic", "dynamic=2", 100.0, {"max_position_embeddings": 16}),
        # What the file says of its own is replaced, its pretrained context stays.
        ("rope_yarn", "yarn=4", None, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 20.0}),
        ("rope_llama3", None, None, {}),
        ("rope_theta", None, 5000.0, {}),
    ],
)
def test_scaling_given_at_load_computes_what_the_file_would(
    case: str, scaling: str | None, theta: float | None, written: dict[str, object], tmp_path: Path
) -> None:
    """Recorded logits of a file that declares the scaling, below and past the context it was trained with."""
    recorded = read_npz(RECORDED / case / "reference.npz")
    folder, own = tmp_path / "model", json.loads((RECORDED / case / "config.json").read_text())
    shutil.copytree(RECORDED / case, folder)
    plain = {key: value for key, value in own.items() if not key.startswith("rope_")} | written
    if written.get("rope_scaling"):
        plain["original_max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(plain))
    if case == "rope_llama3":
        given = own["rope_parameters"]
        model = load(folder, rope_scaling={k: v for k, v in given.items() if k != "rope_theta"}, rope_theta=1e4)
    else:
        model = load(folder, rope_scaling=scaling, rope_theta=theta)
    with model:
        ids = recorded["ids"]
        np.testing.assert_allclose(np.asarray(model.module(mx.array(ids))), recorded["logits"], atol=1e-4, rtol=0)
        if scaling is not None:
            factor = float(scaling.partition("=")[2])
            assert model.engine.context_limit == 16 * factor
            out = model.generate(ids[0, :16].tolist(), max_tokens=4, sampling=SamplingParams())
            assert len(out.token_ids) == 4
    with load(folder) as untouched:
        assert np.abs(np.asarray(untouched.module(mx.array(ids))) - recorded["logits"]).max() > 1e-2
    assert json.loads((folder / "config.json").read_text()) == plain


def test_a_base_alone_lets_the_context_be_any(small: Path) -> None:
    with pytest.raises(ContextLengthError, match=r"context is 3000; the model's own is 1024.*--rope-scaling yarn=3"):
        load(small, context=3000)
    for given in ({"rope_scaling": "yarn=3"}, {"rope_theta": 4e6}):
        with load(small, context=3000, **given) as model:  # type: ignore[arg-type]
            assert model.engine.context_limit >= 3000
            assert len(model.generate([5] * 1100, max_tokens=2).token_ids) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; write KIND=FACTOR"),
        ({"rope_scaling": "llama3=8"}, "of yarn, linear, dynamic"),
        ({"rope_scaling": "yarn=0.5"}, "a number from 1 to 1024"),
        ({"rope_scaling": "yarn=nan"}, "a number from 1 to 1024"),
        ({"rope_scaling": 4}, "text such as yarn=4"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling: rope scaling 'ntk' is not supported"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; it must be a number above 1"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_scaling_that_is_none_is_refused(small: Path, given: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        load(small, **given)  # type: ignore[arg-type]
