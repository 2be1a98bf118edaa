"""Calibration text as token sequences of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.reading import read_given
from mlx_mixtral.tokenizer.base import Tokenizer

__all__ = ["MIN_SEQUENCES", "SEQUENCE_TOKENS", "default_text_files", "default_texts", "read_texts", "sequences"]

SEQUENCE_TOKENS = 256
MIN_SEQUENCES = 4


def default_text_files() -> list[Path]:
    """The bundled text: five languages, code and sums, a file each; the README beside them says where from."""
    return sorted((Path(__file__).parent / "text").glob("*.txt"))


def default_texts() -> list[str]:
    """What is in the bundled files."""
    return [path.read_text(encoding="utf-8") for path in default_text_files()]


def read_texts(paths: list[Path]) -> list[str]:
    """Text files, UTF-8.

    Raises:
        InvalidRequestError: a file that cannot be read, is not text, or is empty.
    """
    texts = []
    for path in paths:
        try:
            text = read_given(path, InvalidRequestError).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"calibration text {path} is not UTF-8: byte {error.start} is not text"
            ) from error
        if not text.strip():
            raise InvalidRequestError(f"calibration text {path} is empty")
        texts.append(text)
    return texts


def sequences(tokenizer: Tokenizer, texts: list[str], max_tokens: int | None, context: int) -> npt.NDArray[np.int32]:
    """Token ids ``[B, L]``: each text cut into runs of L - 1 tokens behind a BOS; what is left over is dropped.

    Args:
        max_tokens: how many tokens at most; taken evenly over the whole text, None for all.
        context: the model's longest sequence; L is 256 or that.

    Raises:
        InvalidRequestError: too little text.
    """
    length = min(SEQUENCE_TOKENS, context)
    rows: list[list[int]] = []
    for text in texts:
        bos, *ids = tokenizer.encode(text)
        step = length - 1
        rows += [[bos, *ids[start : start + step]] for start in range(0, len(ids) - step + 1, step)]
    if len(rows) < MIN_SEQUENCES:
        raise InvalidRequestError(
            f"calibration text is too short: {len(rows)} whole sequences of {length} tokens, at least {MIN_SEQUENCES} are "
            "needed; give more text"
        )
    found = np.array(rows, np.int32)
    if max_tokens is not None and max_tokens < found.size:
        count = max(MIN_SEQUENCES, max_tokens // length)
        found = found[np.linspace(0, len(found) - 1, count).round().astype(int)]
    return found
