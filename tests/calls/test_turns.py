"""Messages of clients, whatever their order, and ids of calls."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.calls.ids import nine_characters, random_id
from mlx_mixtral.calls.turns import NO_RESULT, read_conversation
from mlx_mixtral.errors import ChatTemplateError

from .support import ASK, call, calls, result, says

FORM = re.compile("[A-Za-z0-9]{9}")


def test_ids_are_nine_letters_or_digits() -> None:
    ids = {random_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(map(FORM.fullmatch, ids))


@given(st.text())
def test_a_foreign_id_becomes_nine_characters_that_depend_on_it_alone(given: str) -> None:
    made = nine_characters(given)
    assert FORM.fullmatch(made)
    assert nine_characters(given) == made == nine_characters(made)


def test_foreign_ids_stay_apart() -> None:
    foreign = [f"call_{number}" for number in range(10_000)]
    assert len({nine_characters(each) for each in foreign}) == len(foreign)


def test_a_call_and_its_result_keep_the_same_id() -> None:
    turns = read_conversation([ASK, calls(call("now", call_id="call_x/1")), result("12", "call_x/1")]).turns
    assert turns[1].calls[0].id == nine_characters("call_x/1")
    assert turns[2].call == turns[1].calls[0]


def test_ids_that_every_turn_counts_from_zero_answer_the_latest_call() -> None:
    sent = [
        ASK, calls(call("now", call_id="0")), result("first", "0"), says("assistant", "So."),
        ASK, calls(call("get_weather", call_id="0")), result("second", "0"),
    ]  # fmt: skip
    answered = [(turn.call.name, turn.text) for turn in read_conversation(sent).turns if turn.call is not None]
    assert answered == [("now", "first"), ("get_weather", "second")]


def test_a_result_answers_the_latest_of_two_open_calls_of_its_id() -> None:
    sent = [ASK, calls(call("now", call_id="0")), ASK, calls(call("get_weather", call_id="0")), result("sunny", "0")]
    answered = [(turn.call.name, turn.text) for turn in read_conversation(sent).turns if turn.call is not None]
    assert answered == [("now", NO_RESULT), ("get_weather", "sunny")]


def test_results_without_ids_answer_by_name_or_order() -> None:
    pair = calls(call("now", call_id="one"), call("get_weather", call_id="two"))
    named = read_conversation([ASK, pair, result("w", None, name="get_weather"), result("n", None, name="now")]).turns
    assert [(turn.call.name, turn.text) for turn in named if turn.call] == [("get_weather", "w"), ("now", "n")]
    ordered = read_conversation([ASK, pair, result("n", None), result("w", None)]).turns
    assert [(turn.call.name, turn.text) for turn in ordered if turn.call] == [("now", "n"), ("get_weather", "w")]


def test_the_older_form_of_calls_is_read() -> None:
    old = says("assistant", None, function_call={"name": "now", "arguments": "{}"})
    turns = read_conversation([ASK, old, says("function", "12:00", name="now")]).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool"]
    assert turns[2].call == turns[1].calls[0]
    assert FORM.fullmatch(turns[1].calls[0].id)
    assert turns == read_conversation([ASK, old, says("function", "12:00", name="now")]).turns


def test_calls_stand_with_the_text_that_was_sent_before_them() -> None:
    (_, answer, _) = read_conversation([ASK, says("assistant", "One moment."), calls(call("now")), result("1")]).turns
    assert (answer.text, [each.name for each in answer.calls]) == ("One moment.", ["now"])


def test_a_conversation_that_ends_with_calls_goes_on_from_their_results() -> None:
    conversation = read_conversation([ASK, calls(call("now"), content="Well")])
    assert conversation.begun == ""
    assert (conversation.turns[-1].role, conversation.turns[-1].text) == ("tool", NO_RESULT)


def test_the_assistants_last_text_begins_the_answer() -> None:
    conversation = read_conversation([ASK, says("assistant", [{"type": "text", "text": "It is  "}])])
    assert ([turn.role for turn in conversation.turns], conversation.begun) == (["user"], "It is")
    alone = read_conversation([says("assistant", "It is")])
    assert ([turn.role for turn in alone.turns], alone.begun) == (["user"], "It is")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "it must be a list of at least one message"),
        ("hi", "it must be a list of at least one message"),
        (["hi"], r"^messages\[0\]: must be an object"),
        ([{"content": "a"}], r"^messages\[0\]: unknown role None; use one of system, developer"),
        ([ASK, says(["user"], "a")], r"^messages\[1\]: unknown role"),
        ([says("user", None)], r"^messages\[0\]: content of a user message must be text or a list"),
        ([says("user", 3)], r"^messages\[0\]: content of a user message must be text or a list of parts, got int"),
        ([says("user", [{"type": "image_url", "image_url": {}}])], r"content\[0\] is of type 'image_url'; .*text only"),
        ([says("user", [{"type": "text"}])], r"content\[0\]\.text must be text"),
        ([says("user", [3])], r"content\[0\] is of type None"),
        ([ASK, calls(call("a b"))], r"^messages\[1\]: tool_calls\[0\]\.function\.name is 'a b'"),
        ([ASK, calls(call("f", 3))], r"tool_calls\[0\]\.function\.arguments must be JSON text, got int"),
        ([ASK, calls(call("f", {"a": {1, 2}}))], "what JSON cannot write"),
        ([ASK, calls(call("f", call_id=3))], r"tool_calls\[0\]\.id is 3"),  # type: ignore[arg-type]
        ([ASK, calls("f")], r"tool_calls\[0\] must be"),  # type: ignore[arg-type]
        ([ASK, says("assistant", "", tool_calls="f")], "tool_calls must be a list"),
        ([ASK, result("a", 3)], "tool_call_id and name of a tool's message must be text"),  # type: ignore[arg-type]
    ],
)
def test_a_refusal_says_which_message_and_what(messages: Any, said: str) -> None:
    with pytest.raises(ChatTemplateError, match=said) as caught:
        read_conversation(messages)
    assert "\n" not in str(caught.value)
