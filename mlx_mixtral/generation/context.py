"""What every loop that generates works with: a model, its step, a stream."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["DecodeContext"]


@dataclass(frozen=True)
class DecodeContext:
    """A loaded model, ready to generate.

    Args:
        step: the model's step, one token at a time or a few.
        stream: the MLX stream for all work: one that any thread may use, as a generation may be resumed from several.
        chunk_tokens: tokens of a prompt computed at once; bounds working memory.
    """

    model: MixtralModel
    step: DecodeStep
    stream: mx.Stream
    chunk_tokens: int
