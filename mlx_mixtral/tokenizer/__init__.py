"""Text to token ids and back: SentencePiece, added tokens, streaming decode, chat formats.

Text a user typed never becomes a control token: `encode` keeps markers written in a text as text, and `encode_chat`
does so with Mistral's native formats and with a checkpoint's own jinja template alike.
"""

from __future__ import annotations

from mlx_mixtral.tokenizer.base import Tokenizer
from mlx_mixtral.tokenizer.load import load_tokenizer
from mlx_mixtral.tokenizer.streaming import StreamingDecoder

__all__ = ["StreamingDecoder", "Tokenizer", "load_tokenizer"]
