"""Tables on terminals of any width: a figure is never cut."""

from __future__ import annotations

import itertools

import pytest

from mlx_mixtral.cli.console import note, print_table

COLUMNS = ("what", "mlx-mixtral tok/s", "mlx-lm float32 tok/s", "ratio", "peak memory")
ROWS = (
    ("128 tokens of context", "1,013 tok/s", "35.8 tok/s", "28.3x", "1.43 GB"),
    ("a/long/path/without/any/spaces/model", "400", "", "1.2x", "9.63 MB"),
)


@pytest.mark.parametrize("width", [20, 30, 40, 60, 76, 80, 100, 120, 200])
def test_no_figure_is_cut_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("Decode after a prompt", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    # Names may go on in the next line; a figure stands in one.
    for row in ROWS:
        for cell in filter(None, row[1:]):
            assert any(cell in line for line in lines), cell
    text = "".join(itertools.chain(*(line.split() for line in lines)))
    for name in itertools.chain.from_iterable(name.split() for name in COLUMNS[1:]):
        assert name in text, name
    assert max(map(len, lines)) <= max(width, 4 + len("mlx-lm float32 tok/s"))


@pytest.mark.parametrize(
    ("width", "wrapped"),
    [
        (24, ["/save FILE  write what", "            was said", "/x", "Ctrl-C stops an answer", "and keeps it"]),
        (20, ["/save FILE  write", "what was said", "/x", "Ctrl-C stops an", "answer and keeps it"]),
        (80, ["/save FILE  write what was said", "/x", "Ctrl-C stops an answer and keeps it"]),
    ],
)
def test_every_line_of_a_note_is_wrapped_on_its_own(
    width: int, wrapped: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    note("/save FILE  write what was said\n/x\nCtrl-C stops an answer and keeps it")
    assert capsys.readouterr().err.splitlines() == wrapped
