"""Roundings ``gptq`` and ``tuned``: matrices make up for those before them; the result is whole, and the same after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import load
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral_convert import Calibration, Progress, Recipe, convert
from mlx_mixtral_convert.calibration import states
from mlx_mixtral_convert.calibration.layer import Layer, read_matrix
from mlx_mixtral_convert.output.plan import make_plan
from mlx_mixtral_convert.rounding import LayerByLayer
from mlx_mixtral_convert.sources import open_source
from mlx_mixtral_convert.tuning import attention, experts, packed, trained
from mlx_mixtral_convert.tuning import walk as tuning_walk
from mlx_mixtral_convert.tuning.trained import Rates
from mlx_mixtral_convert.tuning.walk import PackingWalk
from tests.convert.support import CONFIG, dense_config, hashes, load_arrays, make_checkpoint, measured, read_output

RECIPE = Recipe(2, 64, rounding="tuned")


def calibration(folder: Path, sequences: int = 160) -> Calibration:
    return measured(folder, sequences, 24)


def logits(folder: Path, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    with load(folder, dtype="float32") as model:
        return np.array(model.module(mx.array(tokens)).astype(mx.float32))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the steps: enough to see what they do."""
    monkeypatch.setattr(experts, "STEPS", 60)
    monkeypatch.setattr(attention, "STEPS", 40)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", num_local_experts=2)


def uncorrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no matrix makes up for what was lost before it."""
    for module in (experts, tuning_walk):
        monkeypatch.setattr(module, "corrected", lambda weights, *_, **__: mx.array(weights))


@pytest.mark.parametrize(
    "changes",
    [{}, dense_config() | {"num_hidden_layers": 1}, {"sliding_window": 10, "num_hidden_layers": 1}],
    ids=["mixture", "dense", "window"],
)
def test_fresh_text_loses_less_where_matrices_make_up_for_those_before(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than with error compensation within each matrix alone."""
    source = make_checkpoint(tmp_path / "source", num_local_experts=2, **changes)
    known = calibration(source, sequences=200)
    fresh = np.random.default_rng(7).integers(0, CONFIG["vocab_size"], (12, 24)).astype(np.int32)
    true = logits(source, fresh)

    def lost(name: str, rounding: str) -> float:
        convert(source, tmp_path / name, recipe=Recipe(2, 64, rounding=rounding), calibration=known)
        return float(np.square(logits(tmp_path / name, fresh) - true).mean())

    corrected, learned = lost("gptq", "gptq"), lost("tuned", "tuned")
    uncorrected(monkeypatch)
    alone = lost("alone", "gptq")
    assert corrected < 0.75 * alone
    assert learned < 0.75 * alone


@pytest.mark.parametrize("rounding", ["gptq", "tuned"])
@pytest.mark.parametrize("units", [1024, 128])
def test_what_is_missing_is_what_the_packed_layer_does_not_give(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, units: int
) -> None:
    """Kept up to date expert by expert; beside it the states of both models after the layer."""
    monkeypatch.setattr(packed, "UNITS", units)
    passed, seen = PackingWalk._pass_packed, []

    def watched(self: Any, *arguments: Any) -> None:
        missing = np.array(self._other.sequences())
        passed(self, *arguments)
        np.testing.assert_allclose(missing, np.array(self.true.sequences() - self.ours.sequences()), atol=1e-4)
        seen.append(np.abs(missing).max())

    monkeypatch.setattr(PackingWalk, "_pass_packed", watched)
    recipe = Recipe(2, 64, rounding=rounding)
    convert(source, tmp_path / "out", recipe=recipe, calibration=calibration(source, sequences=16))
    assert len(seen) == 2
    assert min(seen) > 0.01


# What is not packed in affine mode is written as the source has it.
KEPT = {"*.layers.0.*down_proj": {"mode": "mxfp4"}, "*.layers.1.*down_proj": None, "*.layers.0.*o_proj": None}


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(2, 64, overrides=KEPT, rounding="gptq")], ids=["tuned", "gptq, some kept"]
)
def test_states_of_the_packed_stream_are_those_of_what_is_written(tmp_path: Path, source: Path, recipe: Recipe) -> None:
    known = calibration(source)
    convert(source, tmp_path / "out", recipe=recipe, calibration=known)
    tensors = open_source(source)
    plan = make_plan(tensors.config, recipe.assign(tensors.config), "BF16")
    rounder = LayerByLayer(known, lambda: open_source(source), plan, learns=recipe.rounding == "tuned")
    rounder.finished = {layer: tmp_path / "out" / shard.file for layer, shard in enumerate(plan.shards[:-1])}
    head = list(matrices(tensors.config))[-1]
    spec = plan.specs[head.path]
    assert spec is not None
    packed = rounder.pack(head, 0, read_matrix(tensors, head).astype(MLX_DTYPES["BF16"]), spec)
    written = load_arrays(tmp_path / "out" / plan.shards[-1].file)
    # The head's codes follow from its inputs, those of the packed layers as they were read back.
    for field, array in packed.items():
        assert mx.array_equal(array, written[f"lm_head.{field}"]), field


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.block_sparse_moe.switch_mlp.down_proj"])
@pytest.mark.parametrize("rounding", ["gptq", "tuned"])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, where: str
) -> None:
    """Stopped among a layer's experts, or while they are written; with its states in files, as those of a longer text are."""

    def stop(at: Progress) -> None:
        if at.what == where and at.done_bytes > 0.7 * at.total_bytes:
            raise KeyboardInterrupt

    known = calibration(source)
    recipe = Recipe(2, 64, overrides={"*.layers.0.*up_proj": {"mode": "mxfp4"}, "*.k_proj": None}, rounding=rounding)
    convert(source, tmp_path / "whole", recipe=recipe, calibration=known)
    monkeypatch.setattr(states, "HELD_BYTES", 0)
    with pytest.raises(KeyboardInterrupt):
        convert(
            source,
            tmp_path / "out",
            recipe=recipe,
            calibration=known,
            progress=stop,
        )
    seen: list[Progress] = []
    report = convert(source, tmp_path / "out", recipe=recipe, calibration=known, progress=seen.append)
    assert report.resumed_layers == 1
    assert [step.seconds_left for step in seen if step.what == where][-1] == pytest.approx(0)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_experts_that_met_too_little_stay_as_they_were_packed_first(tmp_path: Path, source: Path) -> None:
    known = measured(source, 8, 3)
    for rounding in ("search", "tuned"):
        recipe = Recipe(2, 64, overrides={"*.self_attn.*": None}, rounding=rounding)
        convert(source, tmp_path / rounding, recipe=recipe, calibration=known)
    searched, tuned = (read_output(tmp_path / name) for name in ("search", "tuned"))
    assert all(mx.array_equal(array, searched[name]) for name, array in tuned.items() if ".switch_mlp." in name)


def test_an_expert_in_blocks_learns_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", num_local_experts=2, num_hidden_layers=1)
    known = calibration(source, sequences=80)
    fresh = np.random.default_rng(7).integers(0, CONFIG["vocab_size"], (12, 24)).astype(np.int32)
    true, lost = logits(source, fresh), []
    for units in (1024, 128):
        monkeypatch.setattr(packed, "UNITS", units)
        convert(source, tmp_path / str(units), recipe=RECIPE, calibration=known)
        lost.append(float(np.square(logits(tmp_path / str(units), fresh) - true).mean()))
    assert hashes(tmp_path / "1024") != hashes(tmp_path / "128")
    assert lost[1] < 1.1 * lost[0]


def test_what_is_worse_on_text_that_nothing_learned_from_is_not_kept(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = calibration(source)
    uncorrected(monkeypatch)  # so that there is more to learn
    with monkeypatch.context() as patch:
        patch.setattr(experts, "learn", lambda *_: None)
        patch.setattr(attention, "step", lambda *_: None)
        convert(source, tmp_path / "begun", recipe=RECIPE, calibration=known)
    monkeypatch.setattr(experts, "RATES", {2: Rates(3, 3)})
    monkeypatch.setattr(attention, "RATES", Rates(3, 3))
    convert(source, tmp_path / "spoilt", recipe=RECIPE, calibration=known)
    assert hashes(tmp_path / "spoilt") == hashes(tmp_path / "begun")
    monkeypatch.setattr(experts, "RATES", {2: Rates(0.1, 0.01)})
    convert(source, tmp_path / "learned", recipe=RECIPE, calibration=known)
    assert hashes(tmp_path / "learned") != hashes(tmp_path / "begun")
    for every in (1, 1000):  # nothing to learn from, and nothing to be judged by
        monkeypatch.setattr(trained, "JUDGE_EVERY", every)
        convert(source, tmp_path / str(every), recipe=RECIPE, calibration=known)
        assert hashes(tmp_path / str(every)) == hashes(tmp_path / "begun")


def test_no_layer_is_held_while_the_next_one_is_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8x7B a packed layer is 0.6 GB."""
    known, tensors = calibration(source, sequences=1), open_source(source)
    plan = make_plan(tensors.config, RECIPE.assign(tensors.config), "BF16")
    rounder = LayerByLayer(known, lambda: open_source(source), plan, learns=True)
    held: list[int] = []
    step = PackingWalk.step

    def watched(self: Any) -> Any:
        held.append(len(rounder._layer))
        return step(self)

    monkeypatch.setattr(PackingWalk, "step", watched)
    for layer in range(2):
        matrix = next(matrix for matrix in matrices(tensors.config) if matrix.layer == layer)
        spec = plan.specs[matrix.path]
        assert spec is not None
        rounder.pack(matrix, 0, read_matrix(tensors, matrix).astype(mx.bfloat16), spec)
        assert rounder._layer
    assert held == [0, 0]


def test_attention_learns_without_its_unpacked_matrices_in_memory(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def make(*arguments: Any) -> Layer:
        made.append(Layer(*arguments))
        return made[-1]

    def step(*arguments: Any) -> None:
        held.append(len(made[-1].attention))

    made: list[Layer] = []
    monkeypatch.setattr(tuning_walk, "Layer", make)
    monkeypatch.setattr(attention, "step", step)
    convert(source, tmp_path / "out", recipe=RECIPE, calibration=calibration(source))
    assert held
    assert not any(held)


def test_tuning_without_a_calibration_or_with_too_little_text_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InvalidRequestError, match="rounding tuned needs a calibration file"):
        convert(source, tmp_path / "out", recipe=RECIPE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidRequestError, match=r"needs 8 sequences of text, .* has 7; .* --tokens 192, or use gptq"):
        convert(source, tmp_path / "out", recipe=RECIPE, calibration=calibration(source, sequences=7))
    assert not (tmp_path / "out").exists()
