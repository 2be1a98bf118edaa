"""A matrix makes up for what is missing as far as text that nothing was computed from agrees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral_convert.calibration.states import States
from mlx_mixtral_convert.tuning import correction
from mlx_mixtral_convert.tuning.correction import PENALTIES, corrected

SEQUENCES, LENGTH, COLUMNS, ROWS = 48, 8, 12, 5

Floats = npt.NDArray[np.float64]


class Case:
    """Inputs ``x`` that are correlated, and an output ``y`` of which ``signal`` is a linear function of them."""

    def __init__(self, signal: float, noise: float) -> None:
        random = np.random.default_rng(3)
        self.weights = random.normal(size=(ROWS, COLUMNS))
        self.x = random.normal(size=(SEQUENCES * LENGTH, COLUMNS)) @ random.normal(size=(COLUMNS, COLUMNS))
        self.truth = random.normal(size=(ROWS, COLUMNS))
        self.y = signal * self.x @ self.truth.T + noise * random.normal(size=(len(self.x), ROWS))
        self.missing = States(LENGTH, ROWS)
        self.missing.append(mx.array(self.y.astype(np.float32)).reshape(SEQUENCES, LENGTH, ROWS))

    def met(self, block: slice) -> Iterator[tuple[npt.NDArray[np.int32], mx.array]]:
        for tokens in np.array_split(np.arange(len(self.x), dtype=np.int32), 3):
            yield tokens, mx.array(self.x[tokens][:, block].astype(np.float32))

    def change(self, *blocks: slice, apart: bool = False) -> Any:
        weights = self.weights.astype(np.float32)
        found = corrected(weights, blocks, self.met, self.missing, apart=apart)
        return np.array(found) - self.weights

    @property
    def judges(self) -> Any:
        return np.arange(len(self.x)) // LENGTH % 8 == 7

    @property
    def left(self) -> Any:
        return np.array(self.missing.sequences()).reshape(-1, ROWS)


def ridge(x: Floats, y: Floats, penalty: float) -> Floats:
    """As a least-squares problem with rows for the penalty."""
    size = np.sqrt(penalty * np.square(x).sum() / x.shape[1])
    found = np.linalg.lstsq(
        np.vstack([x, size * np.eye(x.shape[1])]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    )
    return np.asarray(found[0]).T


@pytest.mark.parametrize("asked", [ROWS, 2])
def test_the_change_is_the_regression_that_serves_unseen_sequences_best(
    asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of wide matrices every other output, say, is asked which is best."""
    monkeypatch.setattr(correction, "OUTPUTS", asked)
    case = Case(signal=0.03, noise=2.0)
    judges, lost = case.judges, []
    for penalty in PENALTIES:
        learned = ridge(case.x[~judges], case.y[~judges], penalty)
        error = case.y[judges] - case.x[judges] @ learned.T
        lost.append(np.square(error[:, :: ROWS // asked]).sum())
    best = PENALTIES[int(np.argmin(lost))]
    assert (best > min(PENALTIES)) == (asked == ROWS)  # they do not agree
    change = case.change(slice(0, COLUMNS))
    np.testing.assert_allclose(change, ridge(case.x, case.y, best), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(case.left, case.y - case.x @ change.T, rtol=1e-3, atol=1e-3)


def test_what_unseen_sequences_contradict_changes_nothing() -> None:
    case = Case(signal=1.0, noise=0.0)
    turned = np.where(case.judges, -1, 1)[:, None] * case.y
    case.missing.put(0, mx.array(turned.astype(np.float32)).reshape(SEQUENCES, LENGTH, ROWS))
    assert np.abs(case.change(slice(0, COLUMNS))).max() < 1e-6
    np.testing.assert_allclose(case.left, turned, rtol=1e-6)


def test_sequences_that_judge_later_too_are_kept_apart() -> None:
    change = Case(signal=0.03, noise=2.0).change(slice(0, COLUMNS), apart=True)
    case = Case(signal=0.03, noise=2.0)
    assert any(
        np.allclose(change, ridge(case.x[~case.judges], case.y[~case.judges], penalty), rtol=1e-3, atol=1e-4)
        for penalty in PENALTIES
    )


def test_a_block_makes_up_for_what_those_before_it_leave() -> None:
    case = Case(signal=1.0, noise=0.0)
    change = case.change(slice(0, 8), slice(8, COLUMNS))
    np.testing.assert_allclose(case.left, case.y - case.x @ change.T, rtol=1e-3, atol=1e-2)
    first = case.y - case.x[:, :8] @ change[:, :8].T
    assert np.square(case.left).sum() < np.square(first).sum() < np.square(case.y).sum()
