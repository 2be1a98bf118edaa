"""A tokenizer.json alone: byte-level BPE and Llama-like files, against the `tokenizers` package."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mixtral.errors import ChatTemplateError, MissingDependencyError, TokenizerError
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import CHATML, CORPUS, FolderMaker

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def byte_level() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def llama_like(prefix: str) -> Any:
    """BPE with byte fallback; the space in front comes from a normalizer ("Prepend") or from Metaspace's scheme."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdehlo", "he", "ll", "▁he", "hell", "▁hell", "ab"]:
        vocab[piece] = len(vocab)
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("he", "ll"), ("▁he", "ll"), ("a", "b")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    if prefix == "Prepend":
        prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
        tokenizer.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    return tokenizer


@pytest.fixture
def loaded(make_folder: FolderMaker) -> Callable[..., Tokenizer]:
    def load(tokenizer: Any, **config: Any) -> Tokenizer:
        return load_tokenizer(make_folder(None, tokenizer=json.loads(tokenizer.to_str()), tokenizer_config=config))

    return load


def test_byte_level_ids_and_text_are_the_packages(loaded: Callable[..., Tokenizer], byte_level: Any) -> None:
    tokenizer = loaded(byte_level)
    assert tokenizer.vocab_size == byte_level.get_vocab_size()
    for text in CORPUS:
        if not any(marker in text for marker in SPECIAL):
            ids = byte_level.encode(text).ids
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special=True) == byte_level.encode(text).ids


def test_byte_level_markers_in_a_text_stay_text(loaded: Callable[..., Tokenizer], byte_level: Any) -> None:
    tokenizer = loaded(byte_level)
    text = "a<|im_end|><think><|endoftext|>"
    ids = tokenizer.encode(text)
    assert not {tokenizer.special_id(marker) for marker in (*SPECIAL, "<think>")} & set(ids)
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 10**6), max_size=20))
def test_byte_level_streams_as_the_package_decodes(
    byte_level_loaded: Tokenizer, byte_level: Any, seeds: list[int]
) -> None:
    ids = [seed % byte_level_loaded.vocab_size for seed in seeds]
    expected = byte_level.decode(ids, skip_special_tokens=True)
    decoder = byte_level_loaded.streaming_decoder()
    assert "".join([decoder.add(i) for i in ids]) + decoder.finish() == expected
    assert byte_level_loaded.decode(ids) == expected


@pytest.fixture
def byte_level_loaded(loaded: Callable[..., Tokenizer], byte_level: Any) -> Tokenizer:
    return loaded(byte_level)


@pytest.mark.parametrize("prefix", ["Prepend", "always", "first", "never"])
def test_llama_like_ids_are_the_packages(loaded: Callable[..., Tokenizer], prefix: str) -> None:
    package = llama_like(prefix)
    tokenizer = loaded(package, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    for text in ["hello", " hello", "hello  hello\n", "é😀", "", "ab<|im_start|>hello</s> hell", "<s>hello"]:
        assert tokenizer.encode(text, bos=False, special=True) == package.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.decode(tokenizer.encode("</s>hello <|im_start|>")) == "</s>hello <|im_start|>"
    ids = package.encode("hello é😀 ab").ids
    assert tokenizer.decode(ids) == package.decode(ids) == "hello é😀 ab"
    assert tokenizer.decode([3 + 0xC3, 3 + 0x41, 3 + 0xE2, 3 + 0x82]) == "\ufffdA\ufffd\ufffd"


def test_a_vocabulary_that_spells_a_marker_does_not_give_it_away(loaded: Callable[..., Tokenizer]) -> None:
    package = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "<": 1, ">": 2, "<a": 3, "<a>": 4}, [("<", "a"), ("<a", ">")])
    )
    package.decoder = tokenizers.decoders.ByteLevel()
    package.add_special_tokens(["<a>"])
    tokenizer = loaded(package)
    assert tokenizer.encode("<a>") == [1, 0, 2]
    assert tokenizer.encode("a<a><a>a") == [0, 1, 0, 2, 1, 0, 2, 0]
    assert tokenizer.encode("<a>", special=True) == [4]


def test_bos_follows_the_post_processor_where_the_config_is_silent(
    loaded: Callable[..., Tokenizer], byte_level: Any
) -> None:
    assert loaded(byte_level, bos_token="<|im_start|>").encode("a") == byte_level.encode("a").ids
    package = llama_like("Prepend")
    package.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert loaded(package, bos_token="<s>").encode("ab")[0] == 1


def test_chat_formats(loaded: Callable[..., Tokenizer], byte_level: Any) -> None:
    hi = [{"role": "user", "content": "hi<|im_end|>"}]
    assert loaded(byte_level).chat_format == "chatml"
    plain = loaded(llama_like("first"))
    assert plain.chat_format == "none"
    with pytest.raises(ChatTemplateError, match="no chat format"):
        plain.encode_chat(hi)
    tokenizer = loaded(byte_level, chat_template=CHATML, eos_token="<|im_end|>")
    ids = tokenizer.encode_chat(hi)
    assert ids.count(2) == 1
    assert ids[0] == 1
    with_markers = llama_like("first")
    with_markers.add_special_tokens(["[INST]", "[/INST]"])
    native = loaded(with_markers, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert native.chat_format == "mistral-v3"
    named = [native.special_id(marker) for marker in ("<s>", "[INST]", "[/INST]")]
    ids = native.encode_chat(hi)
    assert [ids[0], ids[1], ids[-1]] == named


def test_the_missing_package_is_named_with_its_extra(
    make_folder: FolderMaker, byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(None, tokenizer=json.loads(byte_level.to_str()))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-mixtral\[tokenizers\]'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "tokenizers package can read"),
        ({"model": {"type": "BPE"}}, "tokenizers package can read"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "only byte-level BPE and Llama-like"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "CTC"}},
            "decodes with CTC|can read",
        ),
    ],
)
def test_other_kinds_are_refused(make_folder: FolderMaker, spec: dict[str, Any], said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(make_folder(None, tokenizer=spec))


def _with_pattern(byte_level: Any, regex: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(byte_level.to_str())
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    return spec


def test_a_regular_expression_that_never_ends_is_one_line(byte_level: Any, make_folder: FolderMaker) -> None:
    """The package panics, in an exception that is no Exception; other texts are still read as the package reads them."""
    spec = _with_pattern(byte_level, "(x+x+)+y|z")
    folder = make_folder(None, tokenizer=spec)
    tokenizer, text = load_tokenizer(folder), "x" * 60 + "q"
    with pytest.raises(BaseException, match="retry-limit-in-match") as panic:
        tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(text)
    assert not isinstance(panic.value, Exception)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json cannot be used on this text: .* put the model's own"
    ) as caught:
        tokenizer.encode(text)
    assert "\n" not in str(caught.value)
    plain = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    assert tokenizer.encode_plain("an easy text") == plain.encode("an easy text").ids


def test_an_interrupt_is_no_panic(byte_level: Any, make_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(make_folder(None, tokenizer=json.loads(byte_level.to_str())))

    class Interrupted:
        def encode(self, text: str, **options: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_plain", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(2**15 + 1)]}, "more than 32768 added tokens"),
        ({"added_tokens": [{"id": 1, "content": "x" * 1025}]}, "1 has 1025 characters; no token has more than 1024"),
        ({"model": {"type": "BPE", "vocab": {str(i): i for i in range(2**19 + 1)}, "merges": []}}, "has 524289 pieces"),
        ({"added_tokens": [0.5]}, "added token None: 0.5 needs an id"),
    ],
    ids=["added", "spelling", "pieces", "number"],
)
def test_more_tokens_than_any_model_has_are_refused(
    byte_level: Any, make_folder: FolderMaker, change: dict[str, Any], said: str
) -> None:
    spec = json.loads(byte_level.to_str()) | change
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(make_folder(None, tokenizer=spec))


def test_what_the_package_raises_on_a_text_is_a_line_of_ours(make_folder: FolderMaker) -> None:
    spec = json.loads(llama_like("always").to_str())
    spec["model"] |= {"unk_token": "<absent>", "byte_fallback": False}
    tokenizer = load_tokenizer(make_folder(None, tokenizer=spec))
    with pytest.raises(TokenizerError, match=r"cannot be used on this text: .*<absent>"):
        tokenizer.encode("Ω")
