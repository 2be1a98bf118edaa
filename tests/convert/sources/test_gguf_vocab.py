"""A tokenizer that went through GGUF encodes as the original does."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral_convert import Recipe, convert
from tests.convert.gguf_writer import renamed, write_gguf
from tests.convert.support import CONFIG, weights

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"
MODELS = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tiny": Path(str(resources.files("mlx_mixtral"))) / "demo" / "tiny-mixtral" / "tokenizer.model",
}
CORPUS = json.loads((Path(__file__).parents[2] / "goldens" / "tokenizer_corpus.json").read_text("utf-8"))
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
TEXTS = [
    *CORPUS,
    "  two  spaces\tand\n\n lines ",
    "12345 6.78",
    "naïve café 漢字 🙂 \u200b",
    "",
    " ",
    "<s> [INST] </s>",
]
BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def small_model(folder: Path, keys: Callable[[gguf.GGUFWriter], None], vocab_size: int = 64) -> Path:
    config = CONFIG | {"num_hidden_layers": 1, "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32}
    write_gguf(folder / "m.gguf", config, renamed(weights(config), config), "F16", keys=keys)
    convert(folder / "m.gguf", folder / "out", recipe=Recipe(bits=None))
    return folder / "out"


def pieces(model: Path) -> Callable[[gguf.GGUFWriter], None]:
    """The keys llama.cpp's converter writes for a SentencePiece model."""
    held = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def kind(i: int) -> int:
        if held.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if held.is_control(i):
            return gguf.TokenType.CONTROL
        if held.id_to_piece(i).startswith("[REFERENCE_DOC_"):
            return gguf.TokenType.USER_DEFINED
        return gguf.TokenType.BYTE if held.is_byte(i) else gguf.TokenType.NORMAL

    def write(writer: gguf.GGUFWriter) -> None:
        every = range(held.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([held.id_to_piece(i) for i in every])
        writer.add_token_scores([held.get_score(i) for i in every])
        writer.add_token_types([kind(i) for i in every])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)

    return write


@pytest.mark.parametrize("name", ["tiny", "v1", "v3"])
def test_a_sentencepiece_model_comes_back_and_encodes_alike(tmp_path: Path, name: str) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(MODELS[name]))
    out = small_model(tmp_path, pieces(MODELS[name]), original.vocab_size())
    again = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert again.vocab_size() == original.vocab_size()
    assert [again.bos_id(), again.eos_id(), again.unk_id(), again.pad_id()] == [1, 2, 0, -1]
    for text in TEXTS:
        ids = original.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == original.decode(ids)
    for i in range(original.vocab_size()):
        assert again.id_to_piece(i) == original.id_to_piece(i)
        assert again.get_score(i) == original.get_score(i)
        assert (again.is_control(i), again.is_byte(i)) == (original.is_control(i), original.is_byte(i))
    mine, plain = load_tokenizer(out, vocab_size=original.vocab_size()), tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.model").write_bytes(MODELS[name].read_bytes())
    theirs = load_tokenizer(plain)
    messages = [{"role": "user", "content": "What is 2+2? </s>"}]
    assert mine.encode_chat(messages) == theirs.encode_chat(messages)


def test_chat_template_and_special_ids_are_carried_over(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        pieces(MODELS["tiny"])(writer)
        writer.add_chat_template(CHATML)

    out = small_model(tmp_path, keys, 4096)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert settings["chat_template"] == CHATML
    assert settings["add_bos_token"] is True
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    loaded = load_tokenizer(out)
    assert "<|im_start|>user\nHi<|im_end|>" in loaded.decode(loaded.encode_chat([{"role": "user", "content": "Hi"}]))


def byte_level(pre: str, **changes: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Every byte, a few merges, one marker."""
    letters = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ hello", "' s"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>"]

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(changes.get("model", "gpt2"))
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(changes.get("merges", merges))
        writer.add_eos_token_id(len(tokens) - 1)

    return write


@pytest.mark.parametrize(
    ("pre", "digits"), [("smollm", 2), ("gpt-2", 1), ("llama-bpe", 1), ("qwen2", 2), ("tekken", 2)]
)
def test_byte_level_bpe_becomes_a_tokenizer_json(tmp_path: Path, pre: str, digits: int) -> None:
    tokenizer = load_tokenizer(small_model(tmp_path, byte_level(pre), 265), vocab_size=265)
    for text in TEXTS:
        ids = tokenizer.encode_plain(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert [tokenizer.decode([i]) for i in tokenizer.encode_plain("hello hello")] == ["hello", " hello"]
    assert len(tokenizer.encode_plain("12")) == digits
    assert tokenizer.eos_token_id == 264
    assert tokenizer.encode_plain("<|end|>") != [264]


@pytest.mark.parametrize(("keys", "match"), [
    (byte_level("martian"), "splits text into words by 'martian'"),
    (byte_level("smollm", model="bert"), "tokenizer is of type 'bert'"),
    (byte_level("smollm", merges=["a b c"]), "an entry that is not two pieces"),
    (byte_level("smollm", model="llama"), "scores does not match the 265 tokens"),
])  # fmt: skip
def test_a_tokenizer_that_is_not_understood_is_named(tmp_path: Path, keys: Any, match: str) -> None:
    with pytest.raises(TokenizerError, match=match):
        small_model(tmp_path, keys, 265)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert not list(small_model(tmp_path, lambda writer: None).glob("tokenizer*"))
