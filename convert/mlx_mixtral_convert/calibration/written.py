"""Calibration text that a model writes itself: what it would say, in the proportions in which it would say it.

A few thousand tokens of other text say too little about an expert: what learns from them fits the text and not the model. A
model's own text needs no data, has every language and subject the model was trained on, and there is as much of it as wanted
(LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.files import replace_file
from mlx_mixtral.generation.sampling_params import SamplingParams
from mlx_mixtral.runtime.load import load
from mlx_mixtral.runtime.requests import GenerationOptions
from mlx_mixtral_convert.calibration.text import SEQUENCE_TOKENS

__all__ = ["kept_text", "text_of", "written_sequences"]

Tokens = npt.NDArray[np.int32]

# Rows that are written at once: the weights are read once a step for all of them.
ROWS = 32


def written_sequences(
    writer: str | Path, tokens: int, bos: int, vocab_size: int, context: int, *, seed: int = 0
) -> Tokens:
    """Token ids ``[B, L]`` that ``writer`` samples at temperature 1 after a BOS; L is 256, or ``context`` if that is less.

    No sequence ends before it is full.

    The same for the same seed on the same machine.

    Raises:
        InvalidRequestError: a model with another vocabulary.
        CheckpointError, ConfigError, HubError, MemoryBudgetError: as ``load``.
    """
    length = min(SEQUENCE_TOKENS, context)
    count = max(1, tokens // length)
    with load(writer, prefix_cache=0) as model:
        if model.config.vocab_size != vocab_size:
            raise InvalidRequestError(
                f"{writer} has a vocabulary of {model.config.vocab_size} tokens and the source one of {vocab_size}; let the "
                "source itself or a conversion of it write"
            )
        ends = dict.fromkeys([*model.config.eos_token_ids, *model.tokenizer.eos_token_ids], -math.inf)
        each = [
            GenerationOptions(sampling=SamplingParams(temperature=1.0, seed=seed + index, logit_bias=ends))
            for index in range(count)
        ]
        found = model.generate_batch([[bos]] * count, each=each, max_tokens=length - 1, max_rows=ROWS)
    return np.array([[bos, *generation.token_ids] for generation in found], np.int32)


def text_of(journal: Path) -> Path:
    """Where the text of an unfinished calibration is kept: a GPU need not write the same one again."""
    return journal.with_name(f"{journal.name}.text")


def kept_text(place: Path | None, asked: dict[str, object], write: Callable[[], Tokens]) -> Tokens:
    """The text that lies at ``place`` if it is the one ``asked`` for, else what ``write`` gives, which is kept there.

    Raises:
        DestinationError, DiskSpaceError: it cannot be kept.
    """
    known = json.dumps(asked, sort_keys=True)
    if place is not None and place.exists():
        try:
            with safe_open(str(place), "numpy") as file:
                if (file.metadata() or {}).get("asked") == known:
                    return np.asarray(file.get_tensor("tokens"), np.int32)
        except (OSError, SafetensorError):
            pass
    tokens = write()
    if place is not None:
        replace_file(place, save({"tokens": tokens}, {"asked": known}))
    return tokens
