"""A short part of ``make soak``."""

from __future__ import annotations

from pathlib import Path

from tests.soak.run import soak


def test_changing_budgets_faults_and_cancelling_leave_no_wrong_token(tmp_path: Path) -> None:
    report = soak(60, seed=1, folder=tmp_path)
    assert report.problems == []
    assert {"failed", "cancelled", "finished", "budgets changed"} <= report.outcomes.keys()
