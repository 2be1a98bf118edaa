"""Figures in docs/several-macs.md are those that are computed."""

from __future__ import annotations

from pathlib import Path

from mlx_mixtral.info.links import LINKS
from tests.benchmarks.several_machines import predicted_rows
from tests.markdown import tables_as_written

PAGE = (Path(__file__).parents[2] / "docs" / "several-macs.md").read_text(encoding="utf-8")


def test_predictions_are_those_the_benchmark_prints() -> None:
    (table,) = [table for table in tables_as_written(PAGE) if table[0][0] == "predicted tok/s"]
    assert table == predicted_rows()


def test_links_are_those_there_are() -> None:
    (table,) = [table for table in tables_as_written(PAGE) if table[0][0] == "`--link`"]
    expected = [[f"`{link.name}`", *(f"{link.collective_s(count) * 1e3:.2g} ms" for count in (2, 4))] for link in LINKS]
    assert [[row[0], row[2], row[3]] for row in table[1:]] == expected
