"""Special tokens from every file that may declare them, beside transformers and mlx-lm on the same folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_with_mlx_lm
from mlx_lm.utils import load_config
from transformers import AutoTokenizer

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import CHATML, FolderMaker
from .test_load import user_defined

START, END = 4096, 4097
CONFIG = json.loads((checkpoint_path() / "config.json").read_text()) | {"vocab_size": 4098}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
CHAT_PROMPT = "<|im_start|>user\nHi there, 漢字<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    CHAT_PROMPT,
    "a <|im_end|> b</s>",
    "<|im_end|>",
    "x  <|im_start|>  y",
    "[INST] hi [/INST]",
    "hello",
    "<unk>x",
]


def token(content: str, **changes: Any) -> dict[str, Any]:
    """An AddedToken as the files write it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags, **changes}


ADDED = {"<|im_start|>": START, "<|im_end|>": END}
DECODER = {str(i): token(content, special=True) for content, i in ADDED.items()}


def open_folder(folder: Path, **config: Any) -> Tokenizer:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    read = MixtralConfig.from_folder(folder)
    return load_tokenizer(folder, vocab_size=read.vocab_size, eos_token_ids=read.eos_token_ids)


def stops_of_mlx_lm(folder: Path) -> set[int]:
    found: set[int] = load_with_mlx_lm(folder, eos_token_ids=load_config(folder).get("eos_token_id")).eos_token_ids
    return found


# What is declared where; whether the stop at <|im_end|> is declared at all, or is the chat format's alone.
PLACES: dict[str, tuple[dict[str, Any], bool]] = {
    "special_tokens_map.json, a string": ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "added_tokens": ADDED}, True),
    "special_tokens_map.json, an object": (
        {"special_tokens_map": {"eos_token": token("<|im_end|>")}, "added_tokens": ADDED}, True
    ),
    "tokenizer_config.json": (
        {"tokenizer_config": {**LLAMA, "eos_token": "<|im_end|>"}, "added_tokens": ADDED}, True
    ),
    "tokenizer_config.json, an object": (
        {"tokenizer_config": {**LLAMA, "eos_token": token("<|im_end|>", __type="AddedToken")}, "added_tokens": ADDED}, True
    ),
    "added_tokens_decoder": (
        {"tokenizer_config": {**LLAMA, "eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}}, True
    ),
    "the map against tokenizer_config.json": (
        {
            "special_tokens_map": {"eos_token": "<|im_end|>"},
            "tokenizer_config": {**LLAMA, "eos_token": "</s>"},
            "added_tokens": ADDED,
        },
        True,
    ),
    "the map against a tokenizer_config.json with added_tokens_decoder": (
        {
            "special_tokens_map": {"eos_token": "<|im_end|>"},
            "tokenizer_config": {**LLAMA, "eos_token": "</s>", "added_tokens_decoder": DECODER},
        },
        False,
    ),
    "additional_special_tokens": (
        {"special_tokens_map": {"additional_special_tokens": list(ADDED)}, "added_tokens": ADDED}, False
    ),
    "added_tokens.json alone": ({"added_tokens": ADDED}, False),
    "generation_config.json": ({"added_tokens": ADDED, "generation_config": {"eos_token_id": END}}, True),
    "generation_config.json, a list": ({"added_tokens": ADDED, "generation_config": {"eos_token_id": [2, END]}}, True),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_end_declared_in_one_place_is_the_one_transformers_and_mlx_lm_find(
    make_folder: FolderMaker, place: str
) -> None:
    files, declared = PLACES[place]
    folder = make_folder("tiny", **files)
    ours, theirs = open_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert (END in stops_of_mlx_lm(folder)) is declared
    # Beside theirs: config.json's own, where generation_config.json replaces it for mlx-lm, and the end of a ChatML turn.
    assert ours.eos_token_ids == stops_of_mlx_lm(folder) | {2, END}
    for prompt in PROMPTS:
        ids = theirs.encode(prompt, add_special_tokens=False)
        assert ours.encode(prompt, bos=False, special=True) == ids, prompt
    assert ours.decode([END]) == ""
    assert END not in ours.encode(CHAT_PROMPT)


def test_config_json_alone_declares_ends_too(make_folder: FolderMaker) -> None:
    folder = make_folder("tiny", added_tokens={"<a>": START, "<b>": END})
    assert open_folder(folder, eos_token_id=[2, END]).eos_token_ids == stops_of_mlx_lm(folder) == {2, END}
    assert open_folder(folder, eos_token_id=END).eos_token_ids == stops_of_mlx_lm(folder) | {2}


@pytest.mark.parametrize("name", ["special_tokens_map", "tokenizer_config"])
def test_a_tokenizer_json_gets_its_ends_from_the_files_beside_it(make_folder: FolderMaker, name: str) -> None:
    slow = make_folder("tiny", tokenizer_config={**LLAMA, "added_tokens_decoder": DECODER})
    AutoTokenizer.from_pretrained(slow).save_pretrained(slow)
    fast = json.loads((slow / "tokenizer.json").read_text("utf-8"))
    names = {"eos_token": "<|im_end|>", "bos_token": "<s>", "additional_special_tokens": ["<|im_start|>"]}
    folder = make_folder(None, tokenizer=fast, **{name: names})
    ours, theirs = open_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id) == (END, 1)
    assert ours.eos_token_ids == stops_of_mlx_lm(folder) == {2, END}
    for prompt in PROMPTS:
        assert ours.encode(prompt, bos=False, special=True) == theirs.encode(prompt, add_special_tokens=False), prompt


def test_a_name_makes_a_piece_of_the_model_itself_a_marker(tmp_path: Path) -> None:
    user_defined(tmp_path, "<|im_start|>", "<|im_end|>", "[PAD]", kind=1)
    names = {"eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]"}, "unk_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours = open_folder(tmp_path, vocab_size=4099)
    assert ours.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == END
    assert not {END, 4098} & set(ours.encode("a<|im_end|>[PAD]"))
    assert ours.decode([END, 4098]) == ""


def test_a_name_makes_a_piece_of_a_tokenizer_json_a_marker_and_no_word(make_folder: FolderMaker) -> None:
    slow = make_folder("tiny", tokenizer_config=LLAMA)
    AutoTokenizer.from_pretrained(slow).save_pretrained(slow)
    fast = json.loads((slow / "tokenizer.json").read_text("utf-8"))
    fast["model"]["vocab"] |= ADDED
    word = next(piece for piece in fast["model"]["vocab"] if len(piece) == 3 and piece.isalpha())
    names = {"eos_token": "<|im_end|>", "pad_token": word, "extra_special_tokens": {"image_token": "<|im_start|>"}}
    folder = make_folder(None, tokenizer=fast, special_tokens_map=names)
    ours, theirs = open_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id == END
    assert ours.encode("a<|im_end|>", bos=False, special=True) == theirs.encode("a<|im_end|>", add_special_tokens=False)
    assert not {START, END} & set(ours.encode(CHAT_PROMPT))
    assert ours.decode([END, START]) == ""
    assert ours.decode(ours.encode(f"{word}x {word}")) == f"{word}x {word}"


def test_text_does_not_become_a_piece_that_was_renamed(make_folder: FolderMaker) -> None:
    plain = open_folder(make_folder("tiny"))
    ids = plain.encode("hello the", bos=False)
    piece = plain.id_to_piece(ids[-1])
    decoder = {str(ids[-1]): token("<|im_end|>", special=True)}
    renamed = open_folder(make_folder("tiny", tokenizer_config={"added_tokens_decoder": decoder}))
    assert ids[-1] not in renamed.encode("hello the <|im_end|>")
    assert renamed.decode(renamed.encode("hello the")) == "hello the"
    assert renamed.encode("<|im_end|>", bos=False, special=True) == [ids[-1]]
    assert renamed.id_to_piece(ids[-1]) == "<|im_end|>" != piece


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}\n<|eot_id|>{% endfor %}", "<|eot_id|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}", "<|user|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}. {% endfor %}<|eot_id|>", None),
        ("{{ raise_exception('no conversation is good enough') }}<|eot_id|>", None),
        ("{{ <|im_end|>", None),
    ],
)
def test_the_marker_after_an_answer_in_the_template_ends_a_generation(
    make_folder: FolderMaker, template: str, end: str | None
) -> None:
    names = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>"]
    config = {"added_tokens_decoder": {str(4096 + i): token(name, special=True) for i, name in enumerate(names)}}
    loaded = open_folder(make_folder("tiny", tokenizer_config={**config, "chat_template": template}), vocab_size=4100)
    assert {loaded.id_to_piece(i) for i in loaded.eos_token_ids} == {"</s>", end or "</s>"}
    # Without these tokens in the vocabulary the marker is text.
    plain = open_folder(make_folder("tiny", tokenizer_config={"chat_template": template}))
    assert (plain.eos_token_ids, plain.end_of_turn_text) == ({2}, None if end == "</s>" else end)


def test_what_keeps_a_text_from_ending_is_a_note(make_folder: FolderMaker) -> None:
    loaded = open_folder(make_folder("tiny", special_tokens_map={"eos_token": "<|im_end|>"}))
    assert loaded.eos_token_ids == {2}
    (note,) = loaded.notes
    assert "eos_token is '<|im_end|>', which is not in the vocabulary; generation stops at </s>" in note
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": byte_level}
    endless = load_tokenizer(make_folder(None, tokenizer=spec))
    assert [note.partition(",")[0] for note in endless.notes] == ["no file says which token ends a text"]
    assert open_folder(make_folder("tiny")).notes == ()


def test_a_prompt_that_spells_bos_has_one_as_in_mlx_lm(v1: Tokenizer) -> None:
    # generate.py there: no BOS is added where the prompt starts with it.
    assert v1.encode("<s>[INST] Hi [/INST]", special=True) == v1.encode("[INST] Hi [/INST]")
    assert v1.encode("<s>", special=True) == v1.encode("", special=True) == [1]
    assert v1.encode("a<s>", special=True).count(1) == 2
    assert v1.encode("<s>").count(1) == 1
