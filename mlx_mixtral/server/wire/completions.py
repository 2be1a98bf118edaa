"""/v1/completions: its body, its replies and chunks (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mixtral.server.jobs import NewToken, ReplyPart, ScoredPrompt
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Flag, Integer, texts_or_ids
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs, LogprobEntry, completion_logprobs, prompt_entries
from mlx_mixtral.server.wire.reply import StreamedReply, UsageSoFar
from mlx_mixtral.server.wire.sampling import COMMON_FIELDS, MAX_TOP_LOGPROBS, SAMPLING_FIELDS, STREAM_FIELDS
from mlx_mixtral.server.wire.structure import STRUCTURE_FIELDS
from mlx_mixtral.server.wire.unsupported import NOT_IN_GENERATING
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["COMPLETION_BODY", "CompletionReply", "EchoedPrompt"]

MAX_PROMPTS = 64

COMPLETION_BODY = BodyTable((
    BodyField(
        "prompt",
        texts_or_ids(MAX_PROMPTS),
        "Text or token ids, or a list of several.",
        required=True,
    ),
    *COMMON_FIELDS,
    BodyField("max_tokens", Integer(0), "Most tokens to generate (16); 0, with echo, only scores the prompt."),
    *SAMPLING_FIELDS,
    BodyField("logprobs", Integer(0, MAX_TOP_LOGPROBS), "Log-probabilities of tokens and of so many likeliest ones."),
    BodyField("echo", Flag(), "Give the prompt back before its continuation, scored where logprobs are wanted.", False),
    BodyField("special", Flag(), "Control tokens that the text spells become these tokens.", True),
    BodyField("add_special_tokens", Flag(), "Put BOS before a text.", True),
    *STREAM_FIELDS,
    *STRUCTURE_FIELDS,
    BodyField("best_of", None, "Choosing among several.", off=(1,), instead="use n for several answers, and choose yourself"),
    BodyField("suffix", None, "Text after the gap.", off=("",), instead="this model has not learned to fill in: leave it out"),
    *NOT_IN_GENERATING,
), "CompletionRequest")  # fmt: skip


@dataclass
class EchoedPrompt:
    """A prompt that is given back before each of its continuations.

    Args:
        text: as it was given; the text of its ids.
        tokens: token ids.
        drops_first_space: whether a space at the start is not the text's own.
    """

    text: str
    tokens: Sequence[int]
    drops_first_space: bool
    entries: list[LogprobEntry] = field(default_factory=list)


@dataclass
class _Continuation:
    echo: EchoedPrompt | None
    logprobs: AnswerLogprobs | None
    text: list[str] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None
    given_characters: int = 0
    is_echoed: bool = False


class CompletionReply(StreamedReply):
    """Builds the reply to one request, whole or in chunks.

    Args:
        head: ``id``, ``created``, ``model`` and ``system_fingerprint``.
        logprobs: one a continuation, None where they are not wanted.
        echoes: the prompt of each continuation, None where it is not given back; the same object for several of one prompt.
        scored: prompts by their number in the job's scoring.
        used: what chunks say of tokens.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        logprobs: Sequence[AnswerLogprobs | None],
        echoes: Sequence[EchoedPrompt | None],
        *,
        tokenizer: Tokenizer,
        scored: Sequence[EchoedPrompt] = (),
        used: UsageSoFar,
    ) -> None:
        self._head, self._used, self._tokenizer = dict(head), used, tokenizer
        self._rows = [_Continuation(*parts) for parts in zip(echoes, logprobs, strict=True)]
        self._scored, self._unscored = scored, len(scored)
        self._early: list[NewToken] = []

    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        # Tokens wait until every prompt that is given back is scored.
        if isinstance(event, NewToken):
            if not self._unscored:
                return self._token(event)
            self._early.append(event)
            return []
        if not isinstance(event, ScoredPrompt):
            return []
        echoed = self._scored[event.index]
        echoed.entries = prompt_entries(
            self._tokenizer, echoed.tokens, event.scores, keeps_first_space=not echoed.drops_first_space
        )
        self._unscored -= 1
        if self._unscored:
            return []
        early, self._early = self._early, []
        return [chunk for each in early for chunk in self._token(each)]

    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        chunks = []
        for index, row in enumerate(self._rows):
            if row.finish_reason is None:  # nothing was to be generated
                text, entries = self._echo(row)
                chunks.append(self._chunk([self._choice(index, text, entries, "length")]))
        return chunks + ([self._chunk([], usage)] if self._used.is_told else [])

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index, row in enumerate(self._rows):
            text, entries = self._echo(row)
            row.given_characters = 0
            whole = text + "".join(row.text)
            choices.append(self._choice(index, whole, [*entries, *row.entries], row.finish_reason or "length"))
        return self._head | {"object": "text_completion", "choices": choices, "usage": usage}

    def _token(self, event: NewToken) -> list[dict[str, Any]]:
        self._used.tokens += 1
        row, chunk = self._rows[event.row], event.chunk
        ready = [] if row.logprobs is None else row.logprobs.add(chunk)
        row.text.append(chunk.text)
        row.entries += ready
        row.finish_reason = chunk.finish_reason
        before, echoed = ("", []) if row.is_echoed else self._echo(row)
        row.is_echoed = True
        if not (before or chunk.text or ready or chunk.finish_reason):
            return []
        return [self._chunk([self._choice(event.row, before + chunk.text, [*echoed, *ready], chunk.finish_reason)])]

    @staticmethod
    def _echo(row: _Continuation) -> tuple[str, list[LogprobEntry]]:
        return ("", []) if row.echo is None else (row.echo.text, row.echo.entries)

    def _choice(self, index: int, text: str, entries: Sequence[LogprobEntry], reason: str | None) -> dict[str, Any]:
        row = self._rows[index]
        logprobs = None
        if row.logprobs is not None:
            logprobs = completion_logprobs(entries, row.given_characters)
            row.given_characters += sum(len(entry.token) for entry in entries if entry.data is not None)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = self._head | {"object": "text_completion", "choices": choices}
        return chunk | self._used.field(usage)
