"""A short part of ``make soak``: requests of all kinds to a server in a process of its own, every tenth of them cut."""

from __future__ import annotations

from pathlib import Path

from tests.soak.server import Sample, ServerSoakReport, soak_server


def test_requests_and_cuts_leave_no_file_no_thread_and_no_wrong_answer(tmp_path: Path) -> None:
    report = soak_server(40, seed=1, folder=tmp_path)
    # So early resident memory still grows; what it is later, only the whole of it shows.
    assert [problem for problem in report.problems if "memory" not in problem] == []
    assert {"cut", "streamed", "plain", "with a schema"} <= report.outcomes.keys()
    assert sum(report.outcomes.values()) == 40


def test_growth_is_a_problem() -> None:
    first = Sample(1000, 1.0, 200_000_000, 10_000_000, 7, 12)
    for last, said in (
        (Sample(9000, 2.0, 216_000_000, 10_064_000, 7, 12), []),
        (Sample(9000, 2.0, 216_000_001, 10_000_000, 7, 12), ["resident memory grew from 200000000 to 216000001"]),
        (Sample(9000, 2.0, 200_000_000, 10_064_001, 7, 12), ["MLX's active memory grew from 10000000 to 10064001"]),
        (
            Sample(9000, 2.0, 200_000_000, 10_000_000, 8, 13),
            ["open files grew from 7 to 8", "threads grew from 12 to 13"],
        ),
    ):
        report = ServerSoakReport(samples=[first, last])
        report.check()
        assert report.problems == said
