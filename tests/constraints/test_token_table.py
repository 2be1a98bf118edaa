"""The bytes of every token, against what the tokenizer decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["In the beginning was the Word.", "  two spaces\n\ttab", "naïve café – 😀🇫🇷", '{"a": [1, 2.5e-3, null]}\r\n']


def _byte_level() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def _byte_fallback() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁In", "▁the", "e", "a", "café"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


@pytest.fixture(params=["sentencepiece", "byte level", "byte fallback"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(checkpoint_path())
    made, end = (_byte_level(), "<|end|>") if request.param == "byte level" else (_byte_fallback(), "</s>")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return load_tokenizer(tmp_path)


def test_a_tokens_bytes_are_those_it_decodes_to(any_tokenizer: Tokenizer) -> None:
    table = TokenTable(any_tokenizer)
    texts = 0
    for token, data in enumerate(table.tokens):
        shown = any_tokenizer.decode([token], continues=True)
        if (data.startswith(b"\xff") and len(data) > 1) or not data:
            assert token in any_tokenizer.eos_token_ids or token == any_tokenizer.unk_token_id or shown == ""
        elif b"\xef\xbf\xbd" not in shown.encode():
            assert data == shown.encode()
            texts += 1
    assert texts > 100
    assert any_tokenizer.eos_token_ids <= table.eos_token_ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_its_bytes(any_tokenizer: Tokenizer, text: str) -> None:
    table = TokenTable(any_tokenizer)
    ids = any_tokenizer.encode(text, bos=False)
    assert any_tokenizer.unk_token_id not in ids
    joined = b"".join(table.tokens[token] for token in ids)
    assert joined == any_tokenizer.decode(ids, continues=True).encode()
    # A table's own way to spell a text puts no space before it.
    assert table.table.decode_bytes(table.table.tokenize_str(text)) == text.encode()


def test_only_sentencepiece_takes_the_first_space_off(any_tokenizer: Tokenizer) -> None:
    space_first = next(
        i for i, data in enumerate(TokenTable(any_tokenizer).tokens) if data[:1] == b" " and len(data) > 1
    )
    shown, data = any_tokenizer.decode([space_first]), any_tokenizer.token_bytes(space_first).decode()
    assert TokenTable(any_tokenizer).strips_first_space == (shown == data[1:])
    assert shown in (data, data[1:])


def test_every_end_of_text_is_one_and_none_is_needed(any_tokenizer: Tokenizer) -> None:
    text_token = next(i for i, data in enumerate(TokenTable(any_tokenizer).tokens) if data == b"a")
    assert TokenTable(any_tokenizer, eos_token_ids=[text_token, 10**6]).eos_token_ids == {
        *any_tokenizer.eos_token_ids,
        text_token,
    }
    any_tokenizer.eos_token_ids = frozenset()
    table = TokenTable(any_tokenizer)
    assert table.end_token == table.size
