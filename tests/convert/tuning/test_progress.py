"""How far rounding by ``gptq`` and ``tuned`` is within a layer, how long it still takes, and that it ends when it is to."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert import Progress, Recipe, convert, progress
from mlx_mixtral_convert.progress import ProgressCounter
from mlx_mixtral_convert.sources import open_source
from mlx_mixtral_convert.tuning import attention, experts
from tests.convert.support import make_checkpoint, measured

EXPERTS = 2


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "STEPS", 4)
    monkeypatch.setattr(attention, "STEPS", 4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", num_local_experts=EXPERTS)


@pytest.mark.parametrize(("rounding", "steps"), [("gptq", 1 + 1 + EXPERTS + 1), ("tuned", 1 + 1 + 2 * EXPERTS + 1)])
def test_a_layer_is_told_of_expert_by_expert(source: Path, tmp_path: Path, rounding: str, steps: int) -> None:
    seen: list[Progress] = []
    convert(
        source,
        tmp_path / "out",
        recipe=Recipe(2, 64, rounding=rounding),
        calibration=measured(source, 40, 24),
        progress=seen.append,
    )
    done = [step.done_bytes for step in seen]
    assert done == sorted(done)
    assert done[-2] == seen[-1].total_bytes
    layers = [[step for step in seen if step.what == f"model.layers.{layer}"] for layer in range(2)]
    assert [len(found) for found in layers] == [steps, steps]
    for found in layers:
        assert len({step.done_bytes for step in found}) == steps  # each counts
    # Its matrices, which come after, count nothing more: what is in a layer was passed as a whole.
    after = [step for step in seen if step.what.startswith("model.layers.1.")]
    assert {step.done_bytes for step in after} == {layers[1][-1].done_bytes}
    assert layers[0][0].seconds_left is None
    assert all(step.seconds_left is not None for step in [*layers[0][1:], *layers[1]])
    assert layers[1][-1].seconds_left == pytest.approx(0)


@pytest.mark.parametrize("rounding", ["gptq", "tuned"])
def test_cancelling_does_not_wait_for_the_end_of_a_layer(source: Path, tmp_path: Path, rounding: str) -> None:
    seen: list[Progress] = []

    def cancelled() -> bool:
        return sum(step.what == "model.layers.0" for step in seen) == 3  # its first expert is packed

    with pytest.raises(ConversionError, match=r"^conversion cancelled\b"):
        convert(
            source,
            tmp_path / "out",
            recipe=Recipe(2, 64, rounding=rounding),
            calibration=measured(source, 40, 24),
            progress=seen.append,
            cancelled=cancelled,
        )
    assert seen[-1].what == "model.layers.0"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # there was no finished layer to keep


def test_the_time_left_is_of_the_layers_that_this_run_passes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    seen: list[Progress] = []
    with open_source(source) as opened:
        matrix = next(m for m in matrices(opened.config) if m.layer == 1 and m.part == "router")
    # Of four layers of 100 bytes the first is there already.
    counter = ProgressCounter(seen.append, 400, 4, 100, layer_bytes=dict.fromkeys((1, 2, 3), 100))
    counter.walk(0, 0.0)  # it is passed again, for what comes after it
    clock += 1000
    counter.walk(1, 0.0)
    clock += 10
    counter.walk(1, 0.5)
    counter.step(matrix, 1)
    clock += 20
    counter.walk(1, 1.0)
    counter.step(matrix, 99)
    assert [step.seconds_left for step in seen] == [None, None, 50, 50, 60, 60]
    assert [step.done_bytes for step in seen] == [100, 100, 150, 150, 200, 200]
    assert [step.layer for step in seen] == [0, 1, 1, 1, 1, 1]
