"""Where a text ends among tokens: every way the vocabulary can cut it, found by decoding."""

from __future__ import annotations

from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.tokenizer.breakers import completing_sequences

from .support import FolderMaker


def test_tokens_that_hold_a_text_are_breakers_by_themselves(make_folder: FolderMaker) -> None:
    tokenizer = load_tokenizer(make_folder("tiny"), vocab_size=4096)
    found = completing_sequences(tokenizer, ["\n", ":", '"', "*"])
    shown = {token: tokenizer.decode([5, token], continues=True) for token in range(3, 4096)}
    prefix = tokenizer.decode([5], continues=True)
    wanted = {token for token, text in shown.items() if any(sign in text.removeprefix(prefix) for sign in '\n:"*')}
    assert {ids[0] for ids in found} - {0, 1, 2} == wanted
    assert all(len(ids) == 1 for ids in found)


def test_a_token_that_ends_with_its_beginning_is_one_with_the_rest(make_folder: FolderMaker) -> None:
    tokenizer = load_tokenizer(make_folder("tiny"), vocab_size=4096)
    text = "LORD\nsé"
    found = completing_sequences(tokenizer, [text, text])
    assert found
    for ids in found:
        whole = tokenizer.decode([5, *ids], continues=True)
        assert whole.endswith(text), whole
    heads = [tokenizer.decode([5, ids[0]], continues=True) for ids in found]
    for beginning in ("LORD", "L"):
        assert any(head.endswith(beginning) for head in heads)
    ids = tokenizer.encode(f"the {text}", bos=False)
    assert any(tuple(ids[-len(sequence) :]) == sequence for sequence in found)


def test_control_tokens_count_by_their_spelling(chatml: object) -> None:
    tokenizer = chatml()  # type: ignore[operator]
    assert (4096,) in completing_sequences(tokenizer, ["<|im_start|>"])
