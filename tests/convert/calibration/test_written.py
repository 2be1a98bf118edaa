"""Calibration on text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert import calibrate
from mlx_mixtral_convert.calibration.written import kept_text, written_sequences
from tests.shared import random_checkpoint

TOKENS = 1024


def test_a_model_writes_what_it_thinks_likely(short: Path) -> None:
    """Against the model's own probabilities: the mean surprise of what it writes is its entropy, within sampling's error."""
    with load(short) as model:
        vocab, ends = model.config.vocab_size, {*model.config.eos_token_ids, *model.tokenizer.eos_token_ids}
        rows = written_sequences(short, TOKENS, 1, vocab, 1024)
        assert rows.shape == (4, 256)
        assert rows.dtype == np.int32
        assert (rows[:, 0] == 1).all()
        assert not np.isin(rows, list(ends)).any()
        assert len({row.tobytes() for row in rows}) == len(rows)
        surprise, entropy, spread = [], [], []
        for row in rows:
            logits = np.array(model.logits(row[:-1].tolist()), np.float64)
            logits[:, list(ends)] = -np.inf
            logs = logits - logits.max(axis=-1, keepdims=True)
            logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
            shares = np.exp(logs)
            logs = np.where(np.isfinite(logs), logs, 0.0)
            surprise.append(-logs[np.arange(len(row) - 1), row[1:]])
            entropy.append(-(shares * logs).sum(axis=-1))
            spread.append((shares * logs**2).sum(axis=-1) - entropy[-1] ** 2)
    error = np.sqrt(np.concatenate(spread).sum()) / np.concatenate(spread).size
    assert abs(np.concatenate(surprise).mean() - np.concatenate(entropy).mean()) < 4 * error
    assert np.array_equal(written_sequences(short, TOKENS, 1, vocab, 1024), rows)
    assert not np.array_equal(written_sequences(short, TOKENS, 1, vocab, 1024, seed=100), rows)


def test_a_calibration_measures_it(short: Path, tmp_path: Path) -> None:
    found = calibrate(short, tokens=TOKENS, written=short, save=tmp_path / "found")
    with load(short) as model:
        assert np.array_equal(found.tokens, written_sequences(short, TOKENS, 1, model.config.vocab_size, 1024))
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_an_unfinished_calibration_keeps_its_text(tmp_path: Path) -> None:
    place, asked = tmp_path / "x.journal.text", {"tokens": 8}
    first = np.arange(8, dtype=np.int32).reshape(2, 4)
    assert np.array_equal(kept_text(place, asked, lambda: first), first)
    assert np.array_equal(kept_text(place, asked, lambda: pytest.fail("written again")), first)
    assert np.array_equal(kept_text(place, {"tokens": 9}, lambda: first + 1), first + 1)
    place.write_bytes(b"damaged")
    assert np.array_equal(kept_text(place, asked, lambda: first), first)


def test_what_cannot_be_written(short: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 1000)
    with pytest.raises(InvalidRequestError, match="not both"):
        calibrate(short, [text], written=short)
    random_checkpoint(tmp_path / "other")
    with pytest.raises(InvalidRequestError, match="vocabulary of 256 tokens and the source one of"):
        calibrate(short, written=tmp_path / "other")
