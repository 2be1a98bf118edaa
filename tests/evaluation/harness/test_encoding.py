"""Requests as token ids: one BOS, blanks on the right side, conversations by the ids of their format."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.evaluation.harness.encoding import Encoder
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import GOLDEN, with_template

MESSAGES = [
    {"role": "user", "content": "Hi </s>"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Where is Paris?"},
]


@pytest.fixture(scope="module")
def native(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


def test_bos_stands_once_before_a_context_and_before_none(native: Tokenizer) -> None:
    encoder = Encoder(native)
    for context, continuation in (("And God", " said"), ("", "And God said"), ("And God ", "said")):
        pair = encoder.pair(context, continuation)
        assert (pair.context + pair.continuation).count(1) == 1
        assert pair.context + pair.continuation == tuple(native.encode("And God said"))
    assert encoder.prompt("") == [1]
    assert encoder.prompt("And God") == native.encode("And God")


def test_text_that_looks_like_a_control_token_is_text(native: Tokenizer) -> None:
    pair = Encoder(native).pair("a </s> b", " c </s>")
    assert 2 not in pair.context + pair.continuation


def test_a_tokenizer_that_adds_no_bos_has_it_before_an_empty_context_only(tiny: Path, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "copy", "")
    place = folder / "tokenizer_config.json"
    place.write_text(place.read_text().replace('"add_bos_token": true', '"add_bos_token": false'))
    pytest.importorskip("lm_eval")  # for windows
    encoder = Encoder(load_tokenizer(folder))
    assert 1 not in encoder.pair("And God", " said").context
    assert encoder.pair("", "And God").context == (1,)
    assert encoder.windows("And God said", 8)[0].context == (1,)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_windows_predict_every_token_once_from_no_more_than_size(native: Tokenizer, size: int) -> None:
    pytest.importorskip("lm_eval")
    encoder = Encoder(native)
    text = "And God said, Let there be light: and there was light."
    windows = encoder.windows(text, size)
    assert [token for window in windows for token in window.continuation] == encoder.text(text)
    ids = [1, *encoder.text(text)]
    done = 0
    for window in windows:
        end = done + len(window.continuation)
        read = window.context + window.continuation
        assert list(read) == ids[end + 1 - len(read) : end + 1]
        assert len(read) - 1 == min(size, end)
        done = end


def test_a_conversation_is_the_ids_of_the_native_format_and_its_answer_a_segment_of_its_own(native: Tokenizer) -> None:
    encoder = Encoder(native)
    text = encoder.render_chat(MESSAGES)
    assert text == "<s> [INST] Hi </s> [/INST] Hello</s> [INST] Where is Paris? [/INST]"
    assert encoder.prompt(text) == native.encode_chat(MESSAGES)
    for continuation in ("In France", " In France"):
        pair = encoder.pair(text, continuation)
        assert pair == (tuple(native.encode_chat(MESSAGES)), tuple(native.encode("In France", bos=False)))


def test_an_answer_that_was_begun_is_gone_on_with(native: Tokenizer) -> None:
    encoder = Encoder(native)
    text = encoder.render_chat([*MESSAGES, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert text.endswith("[/INST] It is")
    expected = [*native.encode_chat(MESSAGES), *native.encode("It is in France", bos=False)]
    pair = encoder.pair(text, " in France")
    assert [*pair.context, *pair.continuation] == expected
    assert list(pair.context) == encoder.prompt(text)


def test_a_template_is_read_with_its_markers_and_messages_without(tmp_path: Path) -> None:
    template = GOLDEN["chat"]["template"]
    tokenizer = load_tokenizer(with_template(tmp_path / "copy", template))
    encoder = Encoder(tokenizer)
    text = encoder.render_chat(MESSAGES)
    assert text == "<s>user: Hi </s>\nassistant: Hello\nuser: Where is Paris?\nassistant: "
    assert encoder.prompt(text) == tokenizer.encode_chat(MESSAGES)
    # The blank after "assistant:" is the continuation's.
    pair = encoder.pair(text, "In France")
    assert list(pair.context) == tokenizer.encode_chat(MESSAGES)[:-1]
    assert list(pair.continuation) == tokenizer.encode("In France", bos=False)
    assert pair.context.count(1) == 1
    assert 2 not in pair.context + pair.continuation
    assert tokenizer.chat_source == template


def test_a_format_that_refuses_a_system_prompt_gets_the_conversation_without(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
    )
    encoder = Encoder(load_tokenizer(with_template(tmp_path / "copy", template)))
    assert encoder.render_chat([{"role": "system", "content": "Be brief."}, *MESSAGES]) == "Where is Paris?"
    with pytest.raises(ChatTemplateError):
        Encoder(load_tokenizer(with_template(tmp_path / "other", "{{ raise_exception('never') }}"))).render_chat(
            MESSAGES
        )


def test_a_rendered_conversation_that_is_not_remembered_has_no_second_bos(native: Tokenizer) -> None:
    text = Encoder(native).render_chat(MESSAGES[:1])
    assert Encoder(native).prompt(text).count(1) == 1
