"""A short part of ``make soak``."""

from __future__ import annotations

from pathlib import Path

from tests.soak.run import soak


def test_changing_budgets_faults_and_cancelling_leave_no_wrong_token(short: Path, tmp_path: Path) -> None:
    report = soak(30, seed=1, folder=tmp_path, checkpoint=short)
    assert report.problems == []
    assert {"failed", "cancelled", "finished", "budgets changed"} <= report.outcomes.keys()
