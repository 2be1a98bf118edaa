"""Log-probabilities of answers that call tools: the entries are the tokens of the text, in every protocol that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mlx_mixtral.calls.markup import Delimiters
from mlx_mixtral.calls.parser import CallBegin, CallEnd, CallParser
from mlx_mixtral.generation.stats import Token
from mlx_mixtral.runtime.marked_stops import MarkedStops
from mlx_mixtral.runtime.stream import Chunk, TextAssembler
from mlx_mixtral.server.jobs import NewToken
from mlx_mixtral.server.wire.answers import AnswerReader
from mlx_mixtral.server.wire.chat import ChatReply
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.reply import UsageSoFar
from mlx_mixtral.server.wire.responses_reply import ResponsesReply
from mlx_mixtral.tokenizer import Tokenizer
from tests.server.conftest import Running

CALLS = Delimiters(begin=("<c>",), end=("</c>",), is_list=False)
CALL = '<c>{"name": "now", "arguments": {"a": "the é"}}</c>'
EOS = 2
USAGE = {
    "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0},
}  # fmt: skip


@pytest.fixture
def tokenizer(server: Running) -> Tokenizer:
    return server.model.tokenizer


def _chunks(tokenizer: Tokenizer, text: str, ends: Sequence[int]) -> list[Chunk]:
    """What the engine makes of an answer of ``text``; without ``ends`` it is cut where the text ends."""
    tokens = [*tokenizer.encode_plain(text), *ends]
    assembler = TextAssembler(
        tokenizer.streaming_decoder(continues=False),
        len(tokens),
        frozenset({EOS}),
        MarkedStops([], tokenizer),
        None,
        CallParser(CALLS, {"now"}),
    )
    return [assembler.chunk(Token(token, -float(place))) for place, token in enumerate(tokens)]


def _shown(entries: Sequence[Any]) -> str:
    return b"".join(bytes(entry["bytes"] or b"") for entry in entries).decode()


@pytest.mark.parametrize("ends", [[EOS], []], ids=["ended", "cut"])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        (CALL, ""),
        (f"the the{CALL}", "the the"),
        (f"the{CALL}and what follows", "theand what follows"),
        (f"the{CALL}\n and{CALL}c é ]}}</c>", "theandc é ]}</c>"),
        (f"{CALL}{CALL} <c the", "<c the"),
        ('the <c>{"name": "never"}</c>', 'the <c>{"name": "never"}</c>'),
        ('the <c>{"name": "now", "arguments": oh', "the"),
    ],
)
def test_entries_are_of_the_text_only(tokenizer: Tokenizer, text: str, content: str, ends: list[int]) -> None:
    chunks = _chunks(tokenizer, text, ends)
    told = "".join(chunk.text for chunk in chunks)
    logprobs = [AnswerLogprobs(tokenizer, frozenset({EOS}), 0, continues=False) for _ in range(2)]
    chat = ChatReply({}, [AnswerReader()], [logprobs[0]], used=UsageSoFar())
    responses = ResponsesReply({}, logprobs[1])
    events = [event for chunk in chunks for event in chat.add(NewToken(0, chunk))]
    for chunk in chunks:
        responses.add(NewToken(0, chunk))
    (choice,) = chat.whole(USAGE)["choices"]
    assert (choice["message"]["content"] or "") == told
    assert told == content
    entries = choice["logprobs"]["content"]
    # White space beside a call is no text; a token may hold both.
    assert _shown(entries).replace(" ", "") == told.replace(" ", "")
    places = [entry["logprob"] for entry in entries]
    assert places == sorted(places, reverse=True)
    told_choices = [event["choices"][0] for event in events]
    with_entries = [choice for choice in told_choices if choice["logprobs"]]
    assert [entry for choice in with_entries for entry in choice["logprobs"]["content"]] == entries
    assert all("content" in choice["delta"] for choice in with_entries)
    items = [item for item in responses.whole(USAGE)["output"] if item["type"] == "message"]
    for item in items:
        (part,) = item["content"]
        assert _shown(part["logprobs"]).replace(" ", "") == part["text"].replace(" ", "")


def test_entries_are_told_with_their_text_in_a_stream(tokenizer: Tokenizer) -> None:
    """Also where one token holds text and the beginning of a call, or its end and text, and the next has one character."""
    (word,) = tokenizer.encode_plain("the")
    comma = next(token for token in range(tokenizer.vocab_size) if tokenizer.surface(token) == ",")
    chunks = [
        Chunk("the", word, -1.0),
        Chunk(" the", word, -2.0, call_events=(CallBegin(0, "id", "now"),)),
        Chunk("", word, -3.0),
        Chunk("the", word, -4.0, call_events=(CallEnd(0),)),
        Chunk(",", comma, -5.0),
        Chunk("", EOS, -6.0, finish_reason="stop"),
    ]
    logprobs = [AnswerLogprobs(tokenizer, frozenset({EOS}), 0, continues=False) for _ in range(2)]
    chat = ChatReply({}, [AnswerReader()], [logprobs[0]], used=UsageSoFar())
    responses = ResponsesReply({}, logprobs[1])
    told = []
    for chunk in chunks:
        for event in chat.add(NewToken(0, chunk)):
            choice = event["choices"][0]
            if choice["logprobs"]:
                told.append((choice["delta"].get("content"), [e["token"] for e in choice["logprobs"]["content"]]))
        responses.add(NewToken(0, chunk))
    assert told == [("the", ["the"]), (" the", [" the"]), ("the", [" the"]), (",", [","])]
    items = [item for item in responses.whole(USAGE)["output"] if item["type"] == "message"]
    parts = [item["content"][0] for item in items]
    assert [(part["text"], [entry["logprob"] for entry in part["logprobs"]]) for part in parts] == [
        ("the the", [-1.0, -2.0]),
        ("the,", [-4.0, -5.0]),
    ]
