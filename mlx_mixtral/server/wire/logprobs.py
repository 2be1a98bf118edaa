"""Log-probabilities of tokens as text and bytes, in both of OpenAI's shapes.

The bytes of all entries together are the text, also where a character is spread over several tokens. Control tokens, which
show no text, have the vocabulary's spelling as ``token`` and no bytes; the token that ends an answer has no entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.calls.parser import CallBegin
from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.jobs import PromptScores
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["AnswerLogprobs", "LogprobEntry", "TokenSpeller", "chat_logprobs", "completion_logprobs", "prompt_entries"]

UNLIKELY = -9999.0
"""What stands for minus infinity, which JSON cannot write; OpenAI's value."""


@dataclass(frozen=True)
class LogprobEntry:
    """One token: how it is written, its bytes (None for a control token), and the likeliest ones in its place."""

    token: str
    data: bytes | None
    logprob: float | None
    top: tuple[LogprobEntry, ...] = ()

    @property
    def shown(self) -> bytes:
        return self.data or b""


class TokenSpeller:
    """Spells the tokens of one text one after the other, as ``Tokenizer.decode`` would show them.

    Args:
        continues: the text goes on from earlier text, so a space at its start is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool) -> None:
        self._tokenizer, self._continues = tokenizer, continues
        self._decoder = tokenizer.streaming_decoder(continues=continues)
        self._has_shown = continues

    def spell(self, token_id: int) -> tuple[str, bytes | None]:
        """``token_id`` at this place, which stays: text with U+FFFD for parts of characters, and bytes."""
        if self._has_shown:
            return self._spelled(token_id, self._tokenizer.streaming_decoder(continues=True))
        return self._spelled(token_id, self._tokenizer.streaming_decoder(continues=self._continues))

    def add(self, token_id: int) -> tuple[str, bytes | None]:
        """As ``spell``, and go on behind it."""
        self._decoder.finish()  # what it holds of a character was told already, as bytes
        spelled = self._spelled(token_id, self._decoder)
        self._has_shown = self._has_shown or spelled[1] is not None
        return spelled

    def _spelled(self, token_id: int, decoder: Any) -> tuple[str, bytes | None]:
        if token_id >= self._tokenizer.vocab_size:
            return f"<{token_id}>", None
        surface = self._tokenizer.surface(token_id)
        if surface is None:
            return self._tokenizer.id_to_piece(token_id), None
        shown = decoder.add(token_id)
        data = surface if isinstance(surface, bytes) else shown.encode()
        return data.decode("utf-8", "replace"), data


class AnswerLogprobs:
    """Entries of an answer as its text becomes certain: those of text that a stop string cut off are never given, nor those of
    calls of tools, which are no text.

    Args:
        eos_ids: tokens that end an answer without a text.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], top: int, *, continues: bool) -> None:
        self._speller = TokenSpeller(tokenizer, continues=continues)
        self._eos_ids, self._top = eos_ids, top
        self._held: list[LogprobEntry] = []
        self._given = self._shown = 0
        self._is_behind_call = False

    def add(self, chunk: Chunk) -> list[LogprobEntry]:
        """Take a chunk; the entries whose text is certain with it."""
        if not (chunk.finish_reason == "stop" and chunk.token_id in self._eos_ids):
            self._held.append(self._entry(chunk))
        text = chunk.text.encode()
        if self._is_behind_call:
            if not text:
                return []
            self._drop_call(text)
        self._shown += len(text)
        ready: list[LogprobEntry] = []
        while self._held and (self._given < self._shown or not self._held[0].shown):
            entry = self._held.pop(0)
            self._given += len(entry.shown)
            ready.append(entry)
        # A chunk's text stands before the call that begins with it.
        self._is_behind_call = any(isinstance(event, CallBegin) for event in chunk.call_events)
        return ready

    def _drop_call(self, text: bytes) -> None:
        """Forget entries of a call and of its markup, but for the token that ``text``, which follows it, begins in."""
        all_held = b"".join(entry.shown for entry in self._held)
        begin, end = max(0, all_held.rfind(text)), 0
        while self._held and (end := end + len(self._held[0].shown)) <= begin:
            self._held.pop(0)
        self._given = self._shown
        if self._held:
            # What that token has before the text, such as a space, is no text.
            self._given -= begin - (end - len(self._held[0].shown))

    def _entry(self, chunk: Chunk) -> LogprobEntry:
        top = tuple(
            LogprobEntry(*self._speller.spell(token), _finite(value))
            for token, value in chunk.top_logprobs[: self._top]
        )
        return LogprobEntry(*self._speller.add(chunk.token_id), _finite(chunk.logprob), top)


def prompt_entries(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: PromptScores, *, keeps_first_space: bool
) -> list[LogprobEntry]:
    """Entries of a prompt's tokens, the first without a log-probability."""
    speller, entries = TokenSpeller(tokenizer, continues=keeps_first_space), []
    for token, logprob, top in zip(tokens, scores.logprobs, scores.top, strict=True):
        likeliest = tuple(LogprobEntry(*speller.spell(other), _finite(value)) for other, value in top)
        entries.append(LogprobEntry(*speller.add(token), _finite(logprob), likeliest))
    return entries


def chat_logprobs(entries: Iterable[LogprobEntry]) -> list[dict[str, Any]]:
    """As in ``choices[].logprobs.content`` of a chat completion."""
    return [_chat_entry(entry) | {"top_logprobs": [_chat_entry(each) for each in entry.top]} for entry in entries]


def completion_logprobs(entries: Sequence[LogprobEntry], offset: int) -> dict[str, Any]:
    """As in ``choices[].logprobs`` of a completion; ``offset``: characters of the text before the first entry."""
    shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        shape["tokens"].append(entry.token)
        shape["token_logprobs"].append(entry.logprob)
        shape["text_offset"].append(offset)
        shape["top_logprobs"].append(_likeliest(entry))
        offset += len(entry.token) if entry.data is not None else 0
    return shape | {"bytes": [None if entry.data is None else list(entry.data) for entry in entries]}


def _likeliest(entry: LogprobEntry) -> dict[str, float] | None:
    """By text, the chosen token among them; of two with one spelling the likelier counts."""
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*entry.top, entry):
        if each.logprob is not None:
            found.setdefault(each.token, each.logprob)
    return found


def _chat_entry(entry: LogprobEntry) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": None if entry.data is None else list(entry.data),
    }


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, UNLIKELY)
