"""/v1/embeddings: its body and its reply (https://platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from mlx_mixtral.server.jobs import PooledPrompt, ReplyPart
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Choice, String, texts_or_ids
from mlx_mixtral.server.wire.reply import Reply
from mlx_mixtral.server.wire.sse import compact_json
from mlx_mixtral.server.wire.unsupported import NOT_IN_READING

__all__ = ["EMBEDDINGS_BODY", "MAX_INPUTS", "EmbeddingsReply"]

MAX_INPUTS = 2048

EMBEDDINGS_BODY = BodyTable((
    BodyField(
        "input",
        texts_or_ids(MAX_INPUTS),
        "Text or token ids, or a list of several.",
        required=True,
    ),
    BodyField("model", String(), "Its name or an alias; the model there is when it is left out."),
    BodyField("encoding_format", Choice(("float", "base64")), "Numbers, or the bytes of float32, little-endian.", "float"),
    BodyField("dimensions", None, "Shorter vectors.", instead="this model's vectors have one size: leave it out"),
    BodyField("add_special_tokens", None, "Texts without BOS.", off=(True,), instead="give token ids"),
    BodyField("normalize", None, "Vectors of another length than 1.", off=(True,)),
    BodyField("embd_normalize", None, "Vectors of another length than 1.", off=(2,)),
    *NOT_IN_READING,
    BodyField("user", String(), "Ignored."),
), "EmbeddingsRequest")  # fmt: skip


class EmbeddingsReply(Reply):
    """Builds the reply to one request.

    Args:
        model: its name.
        count: how many vectors there will be.
        is_base64: whether they are written as bytes.
    """

    def __init__(self, model: str, count: int, *, is_base64: bool) -> None:
        self._model, self._is_base64 = model, is_base64
        # As JSON at once: to write thousands of vectors in one go would hold up every stream.
        self._written: list[bytes] = [b""] * count

    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        if isinstance(event, PooledPrompt):
            values = np.asarray(event.vector, "<f4")
            shown = base64.b64encode(values.tobytes()).decode() if self._is_base64 else values.tolist()
            entry = {"object": "embedding", "index": event.index, "embedding": shown}
            self._written[event.index] = compact_json(entry)
        return []

    def body(self, usage: dict[str, Any]) -> bytes:
        counts = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
        rest = compact_json({"model": self._model, "usage": counts})
        return b'{"object":"list","data":[' + b",".join(self._written) + b"]," + rest[1:]
