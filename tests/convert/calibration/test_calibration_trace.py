"""Sensitivities weighed by a routing trace: each expert's squared error counts as often as the trace chooses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.model.routing import record_routing
from mlx_mixtral_convert import calibrate
from mlx_mixtral_convert.calibration.layer import Layer
from mlx_mixtral_convert.calibration.sensitivity import Sensitivity, expert_weights, packed
from mlx_mixtral_convert.calibration.walk import Walk
from mlx_mixtral_convert.sources import open_source
from tests.convert.calibration.test_calibration import read_plain, tokens
from tests.convert.support import CONFIG, dense_config, make_checkpoint

IDS = tokens(3)

Measured = tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("trace") / "source", dtype="F32")


@pytest.fixture(scope="module")
def own_trace(folder: Path) -> RoutingTrace:
    """What the runtime's routers choose for the very tokens that are measured on."""
    with load(folder, dtype="float32") as model:
        return record_routing(model.module, model.logits, [row.tolist() for row in IDS])


def trace_of(*layers: list[list[int]], experts: int = 4) -> RoutingTrace:
    """``layers``: for each its tokens' choices."""
    return RoutingTrace(np.array(layers, np.uint16).transpose(1, 0, 2).copy(), experts)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Measured:
    return measured(folder)


def measured(folder: Path, counts: Any = None) -> Measured:
    """Errors and losses, of two packings for all."""
    source = open_source(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlx_mixtral_convert.calibration.sensitivity.CANDIDATES", (QuantizationSpec(2, 64), QuantizationSpec(3, 64))
        )
        walk, sensitivity = Walk(source, IDS), Sensitivity(source, IDS, counts)
        sensitivity.start()
        for layer, _ in walk.layers():
            sensitivity.step(layer)
        return sensitivity.errors, sensitivity.finish(walk)[0]


def test_counts_are_tokens_that_chose_an_expert_in_a_layer() -> None:
    trace = trace_of([[0, 1], [1, 3], [3, 1]], [[2, 3], [3, 2], [2, 0]])
    assert trace.counts.tolist() == [[1, 3, 0, 2], [1, 0, 3, 2]]


def test_weights_are_the_traces_share_over_the_texts_own() -> None:
    own, wanted = np.array([10, 30, 0, 60]), np.array([40, 20, 30, 10])
    # Expert 2 cannot be measured; the others have 70 of the trace's choices and all 100 of the text's.
    assert expert_weights(own, wanted).tolist() == pytest.approx(
        [(40 / 70) / 0.1, (20 / 70) / 0.3, 0.0, (10 / 70) / 0.6]
    )
    assert (own * expert_weights(own, wanted)).sum() == pytest.approx(own.sum())


@pytest.mark.parametrize("times", [1, 3, 1000])
def test_equal_shares_weigh_one_to_the_last_bit(times: int) -> None:
    for own in ([7, 7, 7], [1, 2, 97], [3, 11, 13]):
        assert expert_weights(np.array(own), times * np.array(own)).tolist() == [1.0, 1.0, 1.0]
    assert expert_weights(np.array([5, 5]), np.array([times, times])).tolist() == [1.0, 1.0]


def test_a_trace_that_knows_only_other_experts_says_nothing() -> None:
    assert expert_weights(np.array([5, 3, 0]), np.array([0, 0, 9])).tolist() == [1.0, 1.0, 1.0]


def test_the_texts_own_trace_changes_nothing(folder: Path, own_trace: RoutingTrace, plain: Measured) -> None:
    assert own_trace.counts.sum() == 2 * 2 * IDS.size
    assert measured(folder, own_trace.counts) == plain


def test_the_error_of_a_layer_is_a_naive_sum_weighed_by_the_trace(folder: Path, own_trace: RoutingTrace) -> None:
    """One token and one expert at a time in numpy, of the first layer's down matrices at 3 bits."""
    counts = np.array([[50, 30, 15, 5], [1, 1, 1, 1]])
    spec = QuantizationSpec(3, 64)
    module = load(folder, dtype="float32").module
    chunk = module.make_cache().chunk(*IDS.shape)
    x = module.embed_tokens.rows(mx.array(IDS), mx.float32)
    layer = module.layers[0]
    h = x + layer.attention(layer.input_norm(x), 0, chunk)
    inputs = np.array(layer.post_attention_norm(h)).reshape(-1, 128)
    source = read_plain(folder)
    prefix = "model.layers.0.block_sparse_moe"
    router = np.array(source[f"{prefix}.gate.weight"])
    own = own_trace.counts[0]
    weight = (counts[0] / counts[0].sum()) / (own / own.sum())
    assert (own > 0).all()
    total = 0.0
    for token in inputs:
        logits = router @ token
        change = np.zeros(128)
        chosen = np.argsort(logits)[-2:]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for expert, share in zip(chosen, shares, strict=True):
            w1, w2, w3 = (source[f"{prefix}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
            gate = np.array(w1) @ token
            inner = gate / (1 + np.exp(-gate)) * (np.array(w3) @ token)
            change += np.sqrt(weight[expert]) * share * (np.array(packed(w2, spec) - w2) @ inner)
        total += float(change @ change)
    errors, _ = measured(folder, counts)
    assert errors["layers.0.down"][str(spec)] == pytest.approx(total / len(inputs), rel=1e-3)


def test_only_losses_of_experts_change_and_each_layer_by_its_own_counts(
    folder: Path, own_trace: RoutingTrace, plain: Measured
) -> None:
    counts = own_trace.counts.copy()
    counts[1] = counts[1][::-1] ** 2
    _, found = measured(folder, counts)
    changed = {name for name, losses in plain[1].items() if found[name] != losses}
    assert changed == {"layers.1.gate_up", "layers.1.down"}


def test_calibrating_measures_sensitivities_with_the_counts_of_a_trace_or_its_file(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Noted:
        def __init__(self, source: object, tokens: object, counts: Any, *_: object) -> None:
            given.append(counts)

        def start(self) -> None: ...

        def step(self, layer: Layer) -> None: ...

        def finish(self, walk: Walk) -> tuple[dict[str, Any], dict[str, Any]]:
            return {}, {}

    monkeypatch.setattr("mlx_mixtral_convert.calibration.measurements.Sensitivity", Noted)
    trace = RoutingTrace(np.tile(np.array([[0, 1], [0, 2]], np.uint16)[:, None], (1, 2, 1)), 8)
    trace.save(tmp_path / "routing.trace")
    for named in (trace, tmp_path / "routing.trace"):
        calibrate(short, tokens=1024, sensitivities=True, trace=named)
    assert [counts.tolist() for counts in given] == [[[2, 1, 1, 0, 0, 0, 0, 0]] * 2] * 2


def test_traces_of_other_shapes_and_no_traces_are_refused(folder: Path, tmp_path: Path) -> None:
    assert CONFIG["num_local_experts"] == 4
    for trace, what in (
        (trace_of([[0, 1]]), "of 1 layers with 2 of 4 experts per token, the model has 2 with 2 of 4"),
        (trace_of([[0, 1]], [[0, 1]], experts=8), "2 layers with 2 of 8"),
        (trace_of([[0]], [[1]]), "2 layers with 1 of 4"),
    ):
        with pytest.raises(InvalidRequestError, match=what):
            calibrate(folder, trace=trace, sensitivities=True)
    with pytest.raises(InvalidRequestError, match="leave it out"):
        calibrate(folder, trace=trace_of([[0, 1]], [[0, 1]]))
    dense = make_checkpoint(tmp_path / "dense", **dense_config())
    with pytest.raises(InvalidRequestError, match="is dense"):
        calibrate(dense, sensitivities=True, trace=trace_of([[0, 1]], [[0, 1]]))
    (tmp_path / "file").write_text("no trace")
    with pytest.raises(CheckpointError, match="file"):
        calibrate(folder, sensitivities=True, trace=tmp_path / "file")
    with pytest.raises(CheckpointError, match="missing"):
        calibrate(folder, sensitivities=True, trace=str(tmp_path / "missing"))
    with pytest.raises(InvalidRequestError, match="trace"):
        calibrate(folder, sensitivities=True, trace=7)  # type: ignore[arg-type]
