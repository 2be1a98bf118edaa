"""The loss a conversion is expected to have, beside what it measures on text the calibration has not seen.

``tests/goldens/tiny-mixtral/calibration`` is recorded by ``tests/goldens/record_calibration.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert import Calibration, Recipe, convert
from mlx_mixtral_convert.calibration.sensitivity import Sensitivity
from mlx_mixtral_convert.calibration.text import sequences
from mlx_mixtral_convert.calibration.uniform import BESIDE_SEARCH, correction
from mlx_mixtral_convert.calibration.walk import Walk
from mlx_mixtral_convert.sources import open_source

GOLDENS = Path(__file__).parents[2] / "goldens" / "tiny-mixtral"
# Of measured losses, how far expected ones may be off on other text of the same length. At 8 bits a few tokens whose router
# chooses otherwise make most of the loss: sequences differ by as much.
BAND, BAND_AT_8_BITS = (0.6, 1.5), (0.4, 2.5)


@pytest.fixture(scope="module")
def recorded() -> Calibration:
    return Calibration.load(GOLDENS / "calibration")


@pytest.fixture(scope="module")
def truth(tiny: Path) -> tuple[Any, mx.array]:
    """Held-out ids ``[B, 256]`` and what the source says of them."""
    with load(tiny, dtype="float32") as model:
        texts = [path.read_text()[:2500] for path in sorted((GOLDENS / "heldout").glob("*.txt"))]
        ids = mx.array(sequences(model.tokenizer, texts, 2048, 1024))
        found = log_softmax(model.module(ids))
        mx.eval(found)
        return ids, found


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def measured(folder: Path, truth: tuple[Any, mx.array]) -> float:
    ids, p = truth
    with load(folder, dtype="float32") as model:
        q = log_softmax(model.module(ids))
        return float((mx.exp(p) * (p - q)).sum(axis=-1).mean().item())


@pytest.mark.parametrize(
    ("wanted", "rounding"),
    [
        *((3, "plain"), (4, "plain"), (8, "plain"), ("5MB", "plain")),
        *((4, "search"), (8, "search"), (4, "gptq"), ("3.5MB", "gptq")),
    ],
)
def test_expected_and_measured_loss_agree_within_the_band(
    recorded: Calibration, truth: tuple[Any, mx.array], tiny: Path, tmp_path: Path, wanted: int | str, rounding: str
) -> None:
    recipe = Recipe(4 if isinstance(wanted, str) else wanted, rounding=rounding)
    fit = wanted if isinstance(wanted, str) else None
    report = convert(tiny, tmp_path / "out", recipe=recipe, fit=fit, calibration=recorded)
    assert report.predicted_kl is not None
    assert report.predicted_kl_error is not None
    assert 0 < report.predicted_kl_error < report.predicted_kl
    low, high = BAND_AT_8_BITS if wanted == 8 else BAND
    assert low < report.predicted_kl / measured(tmp_path / "out", truth) < high


@pytest.mark.parametrize(("rounding", "kl"), [("plain", 0.0442), ("search", 0.0263), ("gptq", 0.0165)])
def test_each_rounding_loses_what_it_did_when_it_was_written(
    recorded: Calibration, truth: tuple[Any, mx.array], tiny: Path, tmp_path: Path, rounding: str, kl: float
) -> None:
    """Of the down matrices of the first layer at 2 bits. GPTQ without its coordinate descent loses 0.0189, with a hundredfold
    damping 0.0232, with a tenth of it 0.0236."""
    recipe = Recipe(None, overrides={"*.layers.0.*down_proj": {"bits": 2}}, rounding=rounding)
    convert(tiny, tmp_path / "out", recipe=recipe, calibration=recorded)
    assert measured(tmp_path / "out", truth) == pytest.approx(kl, rel=0.06)


def test_without_sensitivities_it_is_a_guess_and_a_fit_says_how_to_get_them(
    recorded: Calibration, tiny: Path, tmp_path: Path
) -> None:
    bare = Calibration(recorded.identity, recorded.tokens, recorded.mean_squares, recorded.routed, {})
    assert not bare.anchors
    report = convert(tiny, tmp_path / "out", calibration=bare, dry_run=True)
    assert report.predicted_kl is not None
    assert report.predicted_kl_error is None
    with pytest.raises(InvalidRequestError, match=r"this calibration has none; .* calibrate --sensitivities"):
        convert(tiny, tmp_path / "out", calibration=bare, fit="5MB")


def test_the_correction_is_the_models_own_at_a_uniform_one_and_between_two_between_theirs() -> None:
    anchors = {"plain": [[0.001, 0.004, 0.0004], [0.1, 0.1, 0.03]], "search": [[0.01, 0.02, 0.01]]}
    for row in anchors["plain"]:
        found = correction(anchors, "plain", row[0])
        assert found == pytest.approx((row[1] / row[0], row[2] / row[1]))
    middle = correction(anchors, "plain", 0.01)
    assert middle is not None
    assert middle[0] == pytest.approx(2.0)
    assert middle[1] == pytest.approx(math.hypot(0.1, math.log(2)), rel=0.01) or middle[1] == pytest.approx(
        math.hypot(0.3, math.log(2)), rel=0.01
    )
    assert correction(anchors, "plain", 1e-9) == pytest.approx((4.0, 0.1))
    assert correction(anchors, "plain", 5.0) == pytest.approx((1.0, 0.3))
    assert correction(anchors, "search", 0.5) == pytest.approx((2.0, 0.5))
    for rounding, (share, spread) in BESIDE_SEARCH.items():
        assert correction(anchors, rounding, 0.5) == pytest.approx((2.0 * share, math.hypot(0.5, spread)))
    assert correction({}, "plain", 0.5) is None
    assert correction(anchors, "plain", 0.0) is None


def test_what_is_recorded_is_what_is_measured(
    recorded: Calibration, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of it again: losses of a group are its errors, times a number that all packings share."""
    two = QuantizationSpec(3, 64), QuantizationSpec(4, 64)
    monkeypatch.setattr("mlx_mixtral_convert.calibration.sensitivity.CANDIDATES", two)
    with open_source(tiny) as source:
        few = recorded.tokens[np.linspace(0, len(recorded.tokens) - 1, 4).round().astype(int)]
        walk, sensitivity = Walk(source, recorded.tokens), Sensitivity(source, few)
        sensitivity.start()
        layer, sums = walk.step()
        sensitivity.step(layer)
    for name, found in sums.items():
        np.testing.assert_allclose(
            np.stack([one.mean_squares for one in found]), recorded.mean_squares[name], rtol=1e-4
        )
    for name, errors in sensitivity.errors.items():
        losses = recorded.losses[name]
        ratio = errors["4-bit g64"] / errors["3-bit g64"]
        assert losses["4-bit g64"] / losses["3-bit g64"] == pytest.approx(ratio, rel=1e-3), name
