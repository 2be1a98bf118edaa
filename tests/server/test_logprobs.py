"""Tokens as text and bytes, one by one: together they are what the tokenizer decodes."""

from __future__ import annotations

import pytest

from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.wire.logprobs import UNLIKELY, AnswerLogprobs, TokenSpeller, chat_logprobs, completion_logprobs
from mlx_mixtral.tokenizer import Tokenizer
from tests.server.conftest import Running


@pytest.fixture
def tokenizer(server: Running) -> Tokenizer:
    return server.model.tokenizer


@pytest.mark.parametrize("text", ["Hello there", "  two spaces", "é🙂\n\tx", "🙂", "a\n\nb "])
@pytest.mark.parametrize("continues", [True, False])
def test_bytes_are_those_of_the_text(tokenizer: Tokenizer, text: str, continues: bool) -> None:
    ids = tokenizer.encode(text, bos=False)
    speller = TokenSpeller(tokenizer, continues=continues)
    assert b"".join(speller.add(token)[1] or b"" for token in ids).decode() == tokenizer.decode(
        ids, continues=continues
    )


def test_a_half_character_stays_with_its_own_token(tokenizer: Tokenizer) -> None:
    """The piece behind it does not get the sign for what was lost."""
    smile = tokenizer.encode_plain("🙂")[-4:]
    assert [tokenizer.surface(token) for token in smile] == [bytes([byte]) for byte in "🙂".encode()]
    (word,) = tokenizer.encode_plain("the")
    speller = TokenSpeller(tokenizer, continues=True)
    assert [speller.add(token) for token in (smile[0], smile[1], word)] == [
        ("\ufffd", b"\xf0"),
        ("\ufffd", b"\x9f"),
        (" the", b" the"),
    ]


def test_a_control_token_has_its_name_and_no_bytes(tokenizer: Tokenizer) -> None:
    assert TokenSpeller(tokenizer, continues=False).add(1) == ("<s>", None)
    assert TokenSpeller(tokenizer, continues=False).spell(tokenizer.vocab_size) == (f"<{tokenizer.vocab_size}>", None)


def test_others_in_the_place_of_the_first_word_have_no_space_of_its_own(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode_plain("the")
    speller = TokenSpeller(tokenizer, continues=False)
    assert speller.spell(word) == ("the", b"the")
    assert speller.add(word) == ("the", b"the")
    assert speller.spell(word) == (" the", b" the")


def test_entries_wait_for_their_text(tokenizer: Tokenizer) -> None:
    """As a stop text that may be coming holds the text back, and drops what it turns out to be."""
    ids = tokenizer.encode_plain("the the the")
    answer = AnswerLogprobs(tokenizer, frozenset({2}), 0, continues=True)
    assert answer.add(Chunk("", ids[0], -1.0)) == []
    assert [entry.token for entry in answer.add(Chunk(" the", ids[1], -2.0))] == [" the"]
    assert [entry.logprob for entry in answer.add(Chunk("", ids[2], -3.0, finish_reason="stop"))] == []


def test_the_token_that_ends_an_answer_has_no_entry(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode_plain("the")
    answer = AnswerLogprobs(tokenizer, frozenset({2}), 0, continues=True)
    answer.add(Chunk("", word, -1.0))
    assert [entry.token for entry in answer.add(Chunk(" the", 2, -1.0, finish_reason="stop"))] == [" the"]


def test_infinite_numbers_are_written_as_numbers(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode_plain("the")
    answer = AnswerLogprobs(tokenizer, frozenset(), 1, continues=True)
    infinite = float("-inf")
    (entry,) = answer.add(Chunk(" the", word, infinite, ((word, infinite),)))
    assert chat_logprobs([entry])[0]["logprob"] == UNLIKELY
    assert completion_logprobs([entry], 0)["top_logprobs"] == [{" the": UNLIKELY}]
