"""The text that comes with the converter: what is tuned on it is measured on another."""

from __future__ import annotations

from pathlib import Path

from mlx_mixtral_convert.calibration.text import default_text_files

HELD_OUT = Path(__file__).parents[2] / "goldens" / "tiny-mixtral" / "heldout"
# Shorter lines of code are everyone's: ``from dataclasses import dataclass``.
OWN = 40
RUN_WORDS = 8


def _lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= OWN}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)}


def test_calibration_text_shares_no_line_and_no_run_of_words_with_the_held_out_text() -> None:
    calibration = [path.read_text(encoding="utf-8") for path in default_text_files()]
    held_out = [path.read_text(encoding="utf-8") for path in sorted(HELD_OUT.glob("*.txt"))]
    assert len(calibration) == len(held_out) == 7
    for parts in (_lines, _runs):
        learnt, measured = (set().union(*map(parts, texts)) for texts in (calibration, held_out))
        assert len(learnt) > 30
        assert len(measured) > 300
        assert learnt & measured == set()
