"""Chats with tools: what a model that knows nothing of them writes under the grammar, and what it is made to write without."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.calls.chat import ToolChat
from mlx_mixtral.calls.definitions import read_tools
from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd
from mlx_mixtral.errors import InvalidRequestError, MissingDependencyError
from mlx_mixtral.generation.stats import Token
from mlx_mixtral.runtime.marked_stops import MarkedStops
from mlx_mixtral.runtime.stream import Generation, TextAssembler
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from tests.calls.support import ASK, CITY, NOW, TOOLS, call, calls, says, tool
from tests.tokenizer.support import MODELS

CALL = '{"tool_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}'


def writes(tokenizer: Tokenizer, text: str) -> Any:
    """A processor that has the model write a text, and then end."""
    tokens = [*tokenizer.encode(text, bos=False), tokenizer.eos_token_id]
    prompt_tokens: list[int] = []

    def process(ids: mx.array, logits: mx.array) -> mx.array:
        if not prompt_tokens:
            prompt_tokens.append(ids.size)
        wanted = tokens[min(ids.size - prompt_tokens[0], len(tokens) - 1)]
        return logits + mx.where(mx.arange(logits.size) == wanted, 1e4, 0.0)

    return process


@pytest.fixture
def without_llguidance(monkeypatch: pytest.MonkeyPatch, short_model: Mixtral) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(short_model._requests.__dict__, "constraints", raising=False)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=5)], ids=["greedy", "drawn"]
)
def test_calls_that_have_to_come_come_and_validate(short_model: Mixtral, sampling: SamplingParams) -> None:
    reply = short_model.chat([ASK], tools=TOOLS, tool_choice="required", sampling=sampling, max_tokens=60)
    assert reply.text == ""
    assert reply.tool_calls
    for each in reply.tool_calls:
        assert re.fullmatch("[A-Za-z0-9]{9}", each.id)
        schema = {"get_weather": CITY, "now": {"additionalProperties": False}}[each.name]
        jsonschema.validate(json.loads(each.arguments), schema)


def test_a_stream_of_calls_is_the_same_as_the_whole(short_model: Mixtral) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60}
    options["sampling"] = SamplingParams(temperature=1.0, seed=9)
    whole = short_model.chat([ASK], **options)
    chunks = list(short_model.stream_chat([ASK], **options))
    events = [event for chunk in chunks for event in chunk.call_events]
    for index, each in enumerate(whole.tool_calls):
        (begin,) = [event for event in events if isinstance(event, CallBegin) and event.index == index]
        assert begin.name == each.name
        pieces = [event.text for event in events if isinstance(event, ArgumentsDelta) and event.index == index]
        assert "".join(pieces) == each.arguments
        assert CallEnd(index) in events
    assert "".join(chunk.text for chunk in chunks) == whole.text == ""


def test_a_call_and_its_result_are_the_next_turns_messages(short_model: Mixtral) -> None:
    reply = short_model.chat([ASK], tools=TOOLS, tool_choice="required", max_tokens=60, parallel_tool_calls=False)
    (made,) = reply.tool_calls
    talk = [ASK, says("assistant", None, tool_calls=[made.message]), says("tool", "12", tool_call_id=made.id)]
    answer = short_model.chat(talk, tools=TOOLS, tool_choice="none", max_tokens=4)
    assert answer.tool_calls == ()
    prompt = ToolChat(short_model.tokenizer).prompt(talk, read_tools(TOOLS, "none")).tokens
    assert made.name in short_model.tokenizer.decode(prompt)
    assert answer.stats.prompt_tokens == len(prompt)


def test_text_and_calls_are_told_apart(short_model: Mixtral) -> None:
    def written(text: str, **options: Any) -> Generation:
        forced = [writes(short_model.tokenizer, text)]
        return short_model.chat([ASK], logits_processors=forced, sampling=SamplingParams(), max_tokens=200, **options)

    reply = written(CALL, tools=TOOLS)
    assert (reply.text, reply.finish_reason) == ("", "stop")
    assert [(each.name, each.arguments) for each in reply.tool_calls] == [("get_weather", '{"city": "Rome"}')]
    plain = written("Sunny.", tools=TOOLS)
    assert (plain.text, plain.tool_calls) == ("Sunny.", ())
    untold = written(CALL)
    assert (untold.text, untold.tool_calls) == (CALL, ())


@pytest.mark.usefixtures("without_llguidance")
def test_without_llguidance_calls_are_read_and_cannot_be_forced(short_model: Mixtral) -> None:
    forced = [writes(short_model.tokenizer, CALL)]
    options: dict[str, Any] = {"tools": TOOLS, "logits_processors": forced, "sampling": SamplingParams()}
    reply = short_model.chat([ASK], max_tokens=200, **options)
    assert [each.arguments for each in reply.tool_calls] == ['{"city": "Rome"}']
    with pytest.raises(MissingDependencyError, match="llguidance"):
        short_model.chat([ASK], tool_choice="required", **options)
    for max_tokens in range(2, len(reply.token_ids) - 3):
        cut = short_model.chat([ASK], max_tokens=max_tokens, **options)
        assert (cut.text, cut.tool_calls, cut.finish_reason) == ("", (), "length")


def test_what_is_cut_within_a_call_is_made_whole_under_the_grammar(short_model: Mixtral) -> None:
    long = CALL.replace("Rome", "Rome" * 40)
    forced = [writes(short_model.tokenizer, long)]
    reply = short_model.chat([ASK], tools=TOOLS, logits_processors=forced, sampling=SamplingParams(), max_tokens=60)
    assert reply.finish_reason == "length"
    (made,) = reply.tool_calls
    city = json.loads(made.arguments)["city"]
    assert city.startswith("RomeRome")
    assert len(city) < 160


def test_a_refused_schema_names_its_tool_and_leaves_the_model_free(short_model: Mixtral) -> None:
    odd = tool("odd", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, strict=True)
    with pytest.raises(InvalidRequestError, match=r"^tools\[1\]\.function\.parameters: .*uniqueItems"):
        short_model.chat([ASK], tools=[NOW, odd])
    with pytest.raises(InvalidRequestError, match=r"^tool_choice: there is no tool 'x'"):
        short_model.chat([ASK], tools=[NOW], tool_choice={"function": {"name": "x"}})
    assert short_model.generate("a", max_tokens=1).token_ids


def test_an_answer_goes_on_from_the_assistants_text(short_model: Mixtral) -> None:
    tokenizer = short_model.tokenizer
    prompt = [*tokenizer.encode_chat([ASK]), *tokenizer.encode("It is", bos=False)]
    reply = short_model.chat([ASK, says("assistant", "It is")], sampling=SamplingParams(), max_tokens=6)
    wanted = short_model.generate(prompt, max_tokens=6)
    assert (reply.token_ids, reply.text) == (wanted.token_ids, wanted.text)


def assembled(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> Generation:
    parser = ToolChat(tokenizer).prompt([ASK], read_tools(TOOLS)).parser()
    text = TextAssembler(tokenizer.streaming_decoder(), 500, frozenset({2}), MarkedStops(stop, tokenizer), None, parser)
    return Generation.of([text.chunk(Token(token)) for token in tokens], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [[], ["moment. ["], ["moment.\n"], ["}}]!"]])
def test_text_that_may_begin_a_stop_string_stays_before_the_call(tmp_path: Path, stop: list[str]) -> None:
    shutil.copy(MODELS["v3"], tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    written = tokenizer.encode('[{"name": "now", "arguments": {}}]', bos=False)
    tokens = [*tokenizer.encode("One moment.", bos=False), 5, *written, 2]
    reply = assembled(tokenizer, tokens, stop)
    assert (reply.text, [each.name for each in reply.tool_calls]) == ("One moment.", ["now"])


def test_a_half_character_before_a_call_is_shown_before_it(tmp_path: Path) -> None:
    shutil.copy(MODELS["v3"], tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    half = next(token for token in range(tokenizer.vocab_size) if tokenizer.surface(token) == b"\xf0")
    written = tokenizer.encode('[{"name": "now", "arguments": {}}]', bos=False)
    reply = assembled(tokenizer, [half, 5, *written, 2], [])
    assert (reply.text, [each.name for each in reply.tool_calls]) == ("\ufffd", ["now"])


def test_messages_in_any_order_are_answered(short_model: Mixtral) -> None:
    orders = [
        [says("user", "a"), says("user", "b")],
        [ASK, calls(call("now")), says("tool", "12", tool_call_id="abcdefghi"), says("user", "b")],
        [ASK, says("assistant", "a"), says("developer", "b")],
    ]
    for messages in orders:
        assert short_model.chat(messages, max_tokens=1).token_ids
