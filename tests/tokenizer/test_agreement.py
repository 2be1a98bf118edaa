"""A `tokenizer.model` and a `tokenizer.json` in one folder: what is said when they differ, and which is used."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_mixtral.errors import InvalidRequestError, TokenizerError
from mlx_mixtral.tokenizer import load_tokenizer

from .support import FolderMaker

Spec = dict[str, Any]


@pytest.fixture
def fast(make_folder: FolderMaker) -> Spec:
    """The tiny model as transformers converts it."""
    folder = make_folder("tiny", tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": True})
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    spec: Spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return spec


def piece_at(spec: Spec, token_id: int) -> str:
    return next(piece for piece, i in spec["model"]["vocab"].items() if i == token_id)


def swapped(spec: Spec) -> None:
    vocab = spec["model"]["vocab"]
    one, other = piece_at(spec, 4000), piece_at(spec, 4010)
    vocab[one], vocab[other] = 4010, 4000


def longer(spec: Spec) -> None:
    spec["model"]["vocab"]["<new>"] = 4096


def shorter(spec: Spec) -> None:
    del spec["model"]["vocab"][piece_at(spec, 4095)]


def renamed(spec: Spec) -> None:
    spec["added_tokens"][2]["content"] = "<|im_end|>"


def moved(spec: Spec) -> None:
    spec["added_tokens"].append({"id": 4097, "content": "<b>", "special": True})


@pytest.mark.parametrize(
    ("change", "beside", "said"),
    [
        (swapped, {}, r"id 4000 is '.+' in the first and '.+' in the second \(1 more differ\); the first is used"),
        (longer, {}, r"id 4096 is nothing in the first and '<new>' in the second; the first is used"),
        (shorter, {}, r"id 4095 is '.+' in the first and nothing in the second; the first is used"),
        (renamed, {}, r"id 2 is '</s>' in the first and '<\|im_end\|>' in the second; the second is used"),
        (moved, {"added_tokens": {"<a>": 4097}}, r"id 4097 is '<a>' in the first and '<b>' in the second; the second"),
    ],
)
def test_the_first_difference_is_named(
    make_folder: FolderMaker, fast: Spec, change: Callable[[Spec], None], beside: Spec, said: str
) -> None:
    change(fast)
    folder = make_folder("tiny", tokenizer=fast, **beside)
    (note,) = load_tokenizer(folder).notes
    assert note.startswith("tokenizer.model and tokenizer.json disagree: ")
    assert re.search(said, note), note
    # Who chooses has been told.
    assert (
        load_tokenizer(folder, kind="model").notes == load_tokenizer(folder, kind="json", eos_token_ids=[2]).notes == ()
    )


def test_two_that_agree_need_no_word(make_folder: FolderMaker, fast: Spec) -> None:
    assert load_tokenizer(make_folder("tiny", tokenizer=fast)).notes == ()
    with_more = copy.deepcopy(fast)
    with_more["added_tokens"].append({"id": 4096, "content": "<|im_end|>", "special": True})
    assert load_tokenizer(make_folder("tiny", tokenizer=with_more)).notes == ()
    config = {"added_tokens_decoder": {"4096": {"content": "<x>", "special": True}}, "eos_token": "</s>"}
    assert load_tokenizer(make_folder("tiny", tokenizer=fast, tokenizer_config=config)).notes == ()


def test_the_chosen_file_is_the_one_that_is_read(make_folder: FolderMaker, fast: Spec) -> None:
    swapped(fast)
    folder = make_folder("tiny", tokenizer=fast)
    pieces = {kind: load_tokenizer(folder, kind=kind).id_to_piece(4000) for kind in ("model", "json")}
    assert pieces["json"] == AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(4000) != pieces["model"]
    assert load_tokenizer(folder).id_to_piece(4000) == pieces["model"]
    renamed(fast)
    folder = make_folder("tiny", tokenizer=fast)
    assert [load_tokenizer(folder, kind=kind).id_to_piece(2) for kind in ("model", "json")] == ["</s>", "<|im_end|>"]


def test_a_file_that_is_not_there_cannot_be_chosen(make_folder: FolderMaker, fast: Spec) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; leave out --tokenizer"):
        load_tokenizer(make_folder("tiny"), kind="json")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.model; leave out --tokenizer"):
        load_tokenizer(make_folder(None, tokenizer=fast), kind="model")
    with pytest.raises(InvalidRequestError, match="tokenizer is 'spm'; it must be 'model' or 'json'"):
        load_tokenizer(make_folder("tiny"), kind="spm")
