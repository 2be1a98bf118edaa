"""Text to ids, against mistral-common."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as Reference

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import CORPUS, MODELS, FolderMaker

REFERENCES = {
    "v1": Reference(MODELS["v1"]),
    "v3": Reference(MODELS["v3"]),
    "tiny": Reference(MODELS["tiny"], tokenizer_version=TokenizerVersion.v1),
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MARKER_TEXTS = st.lists(
    st.sampled_from(["</s>", "<s>", "[INST]", "[/INST]", "<unk>", "[REFERENCE_DOC_1]", "▁", " ", "\n", "a", "<0x41>"])
).map("".join)


@pytest.mark.parametrize("name", ["v1", "v3", "tiny"])
def test_ids_are_mistral_commons(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in [*CORPUS, "".join(CORPUS)]:
        assert tokenizer.encode(text) == REFERENCES[name].encode(text, bos=True, eos=False), repr(text)
        assert tokenizer.encode(text, bos=False) == REFERENCES[name].encode(text, bos=False, eos=False), repr(text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS | MARKER_TEXTS, name=st.sampled_from(["v1", "v3", "tiny"]))
def test_ids_of_any_text_are_mistral_commons(text: str, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assert tokenizer.encode(text) == REFERENCES[name].encode(text, bos=True, eos=False)


def test_the_corpus_decodes_to_itself(v3: Tokenizer) -> None:
    for text in CORPUS:
        # SentencePiece writes a space as U+2581, so that character itself comes back as a space.
        assert v3.decode(v3.encode(text)) == text.replace("▁", " ")


def test_markers_in_a_text_stay_text(v3: Tokenizer) -> None:
    text = "</s><s>[INST] a [/INST][TOOL_CALLS][control_20]<unk>"
    ids = v3.encode(text, bos=False)
    assert min(ids) >= 771
    assert v3.decode(ids) == text


def test_special_reads_markers_of_trusted_text(v3: Tokenizer) -> None:
    hi = v3.encode("hi", bos=False)
    assert v3.encode("<s>[INST]hi[/INST]hi</s>", bos=False, special=True) == [1, 3, *hi, 4, *hi, 2]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"])
def test_a_lone_surrogate_is_refused_with_its_place(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"lone surrogate U\+D[0-9A-F]{3} at character"):
        tiny.encode(text)


def test_bytes_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="must be a str, got bytes"):
        tiny.encode(b"abc")  # type: ignore[arg-type]


def test_attributes_of_v1_and_v3(v1: Tokenizer, v3: Tokenizer) -> None:
    for tokenizer, size in ((v1, 32000), (v3, 32768)):
        assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (size, 1, 2)
        assert tokenizer.eos_token_ids == {2}
    assert (v3.id_to_piece(3), v3.special_id("[/INST]"), v1.special_id("[INST]")) == ("[INST]", 4, None)


def test_added_tokens_are_read_from_trusted_text_only(make_folder: FolderMaker) -> None:
    added = {
        "4096": {"content": "<|a|>", "special": True},
        "4097": {"content": "<|a|>b", "special": False, "rstrip": True},
        "4098": {"content": "<|c|>", "special": True, "lstrip": True},
    }
    tokenizer = load_tokenizer(make_folder("tiny", tokenizer_config={"added_tokens_decoder": added}))
    x = tokenizer.encode("x", bos=False)
    assert tokenizer.encode("x<|a|>x<|a|>b  x  <|c|>x", bos=False, special=True) == [*x, 4096, *x, 4097, *x, 4098, *x]
    assert max(tokenizer.encode("x<|a|>x<|a|>b  x  <|c|>x")) < 4096
    assert tokenizer.decode([*x, 4096, 4097, *x]) == "x<|a|>b x"
    assert tokenizer.vocab_size == 4099


@pytest.mark.parametrize("legacy", [True, False, None])
def test_text_after_a_marker_gets_a_prefix_space_unless_the_config_is_not_legacy(
    make_folder: FolderMaker, legacy: bool | None
) -> None:
    config = {"added_tokens_decoder": {"4096": {"content": "<|a|>", "special": True}}}
    config |= {} if legacy is None else {"legacy": legacy}  # type: ignore[dict-item]
    tokenizer = load_tokenizer(make_folder("tiny", tokenizer_config=config))
    ids = tokenizer.encode("hello<|a|>hello", bos=False, special=True)
    first, rest = ids[: ids.index(4096)], ids[ids.index(4096) + 1 :]
    assert first == tokenizer.encode("hello", bos=False)
    assert (rest == first) is (legacy is not False)
    assert tokenizer.decode(rest, continues=True) == ("hello" if legacy is False else " hello")


def test_add_bos_token_false_is_honoured(make_folder: FolderMaker) -> None:
    tokenizer = load_tokenizer(make_folder("tiny", tokenizer_config={"add_bos_token": False}))
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)
