"""Ids to text, one at a time, against SentencePiece's own decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protocol

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import CORPUS, MODELS, FolderMaker

PROCESSORS = {name: sentencepiece.SentencePieceProcessor(model_file=str(path)) for name, path in MODELS.items()}
FIRST_BYTE = {name: processor.piece_to_id("<0x00>") for name, processor in PROCESSORS.items()}


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, rich in what is difficult: byte runs valid and broken, control, unknown, lone spaces."""
    first = FIRST_BYTE[name]
    space = PROCESSORS[name].piece_to_id("▁")
    run = st.text(max_size=3).filter(lambda s: s.isprintable() or "\x00" in s).map(
        lambda s: [first + byte for byte in s.encode("utf-8")]
    )  # fmt: skip
    cut = run.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda n: ids[:n]))
    one = st.integers(0, PROCESSORS[name].vocab_size() - 1).map(lambda i: [i])
    odd = st.sampled_from([[0], [1], [2], [space], [space, space], [first + 0xE2], [first + 0x80], [first + 0x20]])
    return st.lists(run | cut | one | odd, max_size=12).map(lambda parts: [i for part in parts for i in part])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.streaming_decoder()
    pieces = [decoder.add(token_id) for token_id in ids]
    pieces.append(decoder.finish())
    assert decoder.finish() == ""
    return "".join(pieces)


@pytest.mark.parametrize("name", ["v1", "v3", "tiny"])
def test_streamed_and_whole_text_are_sentencepieces(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)

    @settings(max_examples=250, deadline=None)
    @given(ids=ids_of(name))
    def check(ids: list[int]) -> None:
        expected = PROCESSORS[name].decode(ids)
        assert tokenizer.decode(ids) == expected
        assert streamed(tokenizer, ids) == expected

    check()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_leading_spaces_follow_the_models_own_rules(tmp_path: Path, prefix: bool, extra: bool) -> None:
    model = protocol.ModelProto.FromString(MODELS["tiny"].read_bytes())
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = prefix, extra
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    space, hello = processor.piece_to_id("▁"), processor.piece_to_id("▁the")
    for ids in ([hello], [space, hello], [space, space, hello], [1, space, hello, hello], [hello, space, hello]):
        assert streamed(tokenizer, ids) == processor.decode(ids)


def test_every_single_token_decodes_as_sentencepiece_does(v3: Tokenizer) -> None:
    for token_id in range(v3.vocab_size):
        assert v3.decode([token_id]) == PROCESSORS["v3"].decode([token_id])


def test_whole_characters_come_out_as_soon_as_they_are_whole(tiny: Tokenizer) -> None:
    first = FIRST_BYTE["tiny"]
    decoder = tiny.streaming_decoder()
    emitted = [decoder.add(first + byte) for byte in "é😀".encode()]
    assert emitted == ["", "é", "", "", "", "😀"]
    assert decoder.finish() == ""


def test_a_stream_never_shows_half_a_character(v1: Tokenizer) -> None:
    for text in CORPUS:
        decoder = v1.streaming_decoder()
        pieces = [decoder.add(token_id) for token_id in v1.encode(text)]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_broken_byte_run_is_replaced_and_ended_by_a_control_token(tiny: Tokenizer) -> None:
    first = FIRST_BYTE["tiny"]
    assert tiny.decode([first + 0xE2, 2, first + 0x82, first + 0xAC]) == "\ufffd" * 3
    assert streamed(tiny, [first + 0xE2, first + 0x82]) == "\ufffd\ufffd"


def test_continuing_text_keeps_its_first_space(v1: Tokenizer) -> None:
    ids = v1.encode("world", bos=False)
    assert v1.decode(ids) == "world"
    assert v1.decode(ids, continues=True) == " world"


def test_added_tokens_in_the_middle_show_unless_they_are_special(make_folder: FolderMaker) -> None:
    added = {"4096": {"content": "<|x|>", "special": True}, "4097": {"content": "<think>", "special": False}}
    tokenizer = load_tokenizer(make_folder("tiny", tokenizer_config={"added_tokens_decoder": added}))
    first = FIRST_BYTE["tiny"]
    a = tokenizer.encode("a", bos=False)
    assert streamed(tokenizer, [*a, 4096, *a, 4097, *a]) == "a a<think> a"
    assert streamed(tokenizer, [first + 0xC3, 4097, first + 0xA9]) == "\ufffd<think>\ufffd"
    assert streamed(tokenizer, [4096, *a]) == "a"


@pytest.mark.parametrize("token_id", [-1, 4096, 10**12])
def test_an_id_outside_the_vocabulary_is_named_with_the_limit(tiny: Tokenizer, token_id: int) -> None:
    for call in (lambda: tiny.decode([5, token_id]), lambda: tiny.streaming_decoder().add(token_id)):
        with pytest.raises(InvalidRequestError, match=rf"token id {token_id} .*vocabulary of 4096"):
            call()
    with pytest.raises(InvalidRequestError):
        tiny.id_to_piece(token_id)


def test_token_bytes_join_to_the_text(tiny: Tokenizer) -> None:
    text = "Grüße 😀 [INST]"
    assert b"".join(map(tiny.token_bytes, tiny.encode(text))) == f" {text}".encode()
