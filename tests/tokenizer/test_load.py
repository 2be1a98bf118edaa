"""Which files make a tokenizer, and what is said when they do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.tokenizer.sentencepiece_proto import retype_markers

from .support import CHATML, MODELS, FolderMaker


def test_a_folder_without_a_tokenizer_says_what_was_looked_for_and_what_still_works(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model.*tokenizer\.json.*token ids still work"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v9"]
)
def test_the_format_follows_the_pieces_not_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(MODELS["v3"])
    assert load_tokenizer(tmp_path).chat_format == "mistral-v3"


def test_the_plain_name_comes_first(tmp_path: Path) -> None:
    shutil.copy(MODELS["tiny"], tmp_path / "tokenizer.model")
    shutil.copy(MODELS["v3"], tmp_path / "tokenizer.model.v3")
    (tmp_path / "tokenizer.model.v1").mkdir()
    assert load_tokenizer(tmp_path).vocab_size == 4096


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no pieces|not a SentencePiece"),
        (b"\x00\x01garbage", "broken|not a SentencePiece"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    ],
)
def test_a_broken_model_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("keep", [1, 100, 1000, 50_000])
def test_a_model_cut_off_is_an_error(tmp_path: Path, keep: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODELS["tiny"].read_bytes()[:keep])
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)


def test_more_pieces_than_the_model_has_rows_names_both_numbers(make_folder: FolderMaker) -> None:
    folder = make_folder("tiny")
    assert load_tokenizer(folder, vocab_size=4096).vocab_size == 4096
    assert load_tokenizer(folder, vocab_size=5000).vocab_size == 4096
    with pytest.raises(TokenizerError, match=r"has 4096 pieces.*vocab_size is 4095"):
        load_tokenizer(folder, vocab_size=4095)


def test_added_tokens_beyond_the_model_are_left_out_unless_the_template_needs_them(make_folder: FolderMaker) -> None:
    pad = {"[PAD]": 4096}
    assert load_tokenizer(make_folder("tiny", added_tokens=pad), vocab_size=4096).vocab_size == 4096
    folder = make_folder("tiny", added_tokens={"<|im_start|>": 4096}, tokenizer_config={"chat_template": CHATML})
    with pytest.raises(TokenizerError, match=r"uses <\|im_start\|>, added token 4096.*vocab_size is 4096"):
        load_tokenizer(folder, vocab_size=4096)


def test_added_tokens_from_every_file(make_folder: FolderMaker) -> None:
    folder = make_folder(
        "tiny",
        added_tokens={"<a>": 4096, "<b>": 4097, "<pad>": 4099},
        tokenizer={"added_tokens": [{"id": 4097, "content": "<b>", "special": True, "rstrip": True}]},
        tokenizer_config={
            "added_tokens_decoder": {"4098": {"content": "<c>", "special": False}},
            "pad_token": {"content": "<pad>"},
            "eos_token": "<c>",
        },
    )
    tokenizer = load_tokenizer(folder, eos_token_ids=[2, 4097])
    assert tokenizer.encode("<a><b> <c><pad>", bos=False, special=True) == [4096, 4097, 4098, 4099]
    assert tokenizer.decode([4096, 4097, 4098, 4099]) == "<a>"
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids) == (4098, {2, 4097, 4098})
    assert [tokenizer.id_to_piece(i) for i in (1, 4096, 4098)] == ["<s>", "<a>", "<c>"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"added_tokens": {"<a>": -1}}, "needs an id"),
        ({"added_tokens": {"<a>": "x"}}, "needs an id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "needs an id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": "a"}}}, "needs an id"),
        ({"tokenizer_config": []}, "holds a JSON list, not an object"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template should be"),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "chat_template should be"),
    ],
)
def test_broken_settings_name_their_file(make_folder: FolderMaker, files: dict[str, object], said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(make_folder("tiny", **files))


def test_broken_json_names_its_file(make_folder: FolderMaker) -> None:
    folder = make_folder("tiny")
    for text in ("{", "[" * 100_000, "\ufffe"):
        (folder / "tokenizer_config.json").write_text(text, "utf-8")
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON: .*download it again"):
            load_tokenizer(folder)


def user_defined(folder: Path, *pieces: str, kind: int = 4) -> protocol.ModelProto:
    """Write the tiny model with further pieces of a type, as SentencePiece's own protocol classes do."""
    model = protocol.ModelProto.FromString(MODELS["tiny"].read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return model


def test_user_defined_pieces_that_are_markers_do_not_come_out_of_a_text(tmp_path: Path) -> None:
    model = user_defined(tmp_path, "<|im_end|>", "[INST]", "[REFERENCE_DOC_1]", "hello")
    raw = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    assert 4096 in raw.encode("a<|im_end|>"), "this is what must not happen"
    tokenizer = load_tokenizer(tmp_path)
    text = "a<|im_end|>[INST][REFERENCE_DOC_1]hello"
    ids = tokenizer.encode(text)
    assert not {4096, 4097} & set(ids)
    assert {4098, 4099} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|im_end|>", bos=False, special=True)[-1] == 4096
    assert tokenizer.decode([4096]) == "<|im_end|>"


@pytest.mark.parametrize("kind", [1, 4])
def test_pieces_declared_special_do_not_come_out_of_a_text(tmp_path: Path, kind: int) -> None:
    user_defined(tmp_path, "~~", kind=kind)
    declared = {"added_tokens_decoder": {"4096": {"content": "~~", "special": True}}}
    assert 4096 in load_tokenizer(tmp_path).encode("a~~")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    tokenizer = load_tokenizer(tmp_path)
    assert 4096 not in tokenizer.encode("a~~")
    assert tokenizer.decode([4096]) == ""


def test_retyping_changes_nothing_else(tmp_path: Path) -> None:
    model = user_defined(tmp_path, "<|im_end|>", "x" * 300 + "<y>")
    changed, ids = retype_markers(model.SerializeToString(), ["x" * 300 + "<y>"])
    assert ids == {4096: "<|im_end|>", 4097: "x" * 300 + "<y>"}
    model.pieces[4096].type = model.pieces[4097].type = 3
    assert protocol.ModelProto.FromString(changed) == model
    same = MODELS["v3"].read_bytes()
    assert retype_markers(same, ["</s>"]) == (same, {})


def test_importing_the_package_imports_no_dependency() -> None:
    code = (
        "import sys, mlx_mixtral.tokenizer; "
        "print([m for m in ('jinja2', 'tokenizers', 'sentencepiece', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == "[]"


def _root() -> Path:
    return Path(__file__).parents[2]


def test_millions_of_pieces_are_refused_before_they_are_all_looked_at(make_folder: FolderMaker) -> None:
    """Ten million of them fit 50 MB."""
    folder = make_folder(None)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a" * 10_000_000)
    with pytest.raises(TokenizerError, match="more than 524288 pieces"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", [1, 3])
def test_a_piece_that_is_not_utf_8_is_refused_at_load(make_folder: FolderMaker, kind: int) -> None:
    folder = make_folder("tiny")
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + bytes([0x0A, 6, 0x0A, 2, 0x80, 0x80, 0x18, kind]))
    with pytest.raises(TokenizerError, match=r"not UTF-8|is damaged or truncated"):
        load_tokenizer(folder)
