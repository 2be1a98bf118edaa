"""Prompts with tools: Mistral's v3 against mistral-common, templates against transformers, the rest written out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_mixtral.calls.chat import ToolChat
from mlx_mixtral.calls.definitions import read_tools
from mlx_mixtral.calls.ids import nine_characters
from mlx_mixtral.constraints.specs import JsonObject
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral.tokenizer.chat.choice import given_template
from tests.tokenizer.support import GOLDENS, FolderMaker

from .support import ASK, NOW, TOOLS, WEATHER, call, calls, result, says

MakeChatml = Callable[..., Tokenizer]
RECORDED = json.loads((GOLDENS / "tool_conversations.json").read_text("utf-8"))["conversations"]

# Knows tools, calls and results, in the manner of Hermes.
KNOWS_TOOLS = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools> <tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>tool\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{ '\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + ARGUMENTS + '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
AS_OBJECT = KNOWS_TOOLS.replace("ARGUMENTS", "(call.function.arguments | tojson)")
AS_TEXT = KNOWS_TOOLS.replace("ARGUMENTS", "call.function.arguments")
# Knows user and assistant alone, and those in turn.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{{ '<assistant>' }}"
)
TALK = [
    says("system", "Be brief."),
    ASK,
    calls(call("get_weather", {"city": "Zürich"}), call("now", {}, "abcdefgh2"), content="One moment."),
    result('{"sky": "clear"}'),
    result("12:00", "abcdefgh2"),
    says("user", "And?"),
]


def ids(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any = None, way: str = "auto") -> list[int]:
    return ToolChat(tokenizer, way).prompt(messages, read_tools(tools)).tokens


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a rendered prompt, as ``encode_chat`` makes them."""
    return tokenizer.encode(text, bos=False, special=True)


def shown(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """A prompt as text, its control tokens spelled out."""
    text = ""
    for hidden, run in itertools.groupby(tokens, lambda token: tokenizer.surface(token) is None):
        listed = list(run)
        text += "".join(map(tokenizer.id_to_piece, listed)) if hidden else tokenizer.decode(listed, continues=True)
    return text


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["name"])
def test_v3_prompts_are_those_of_mistral_common(entry: dict[str, Any], v3: Tokenizer) -> None:
    assert ToolChat(v3).prompt(entry["messages"], read_tools(entry["tools"])).tokens == entry["v3"]


def test_foreign_ids_are_mapped_in_calls_and_results(v3: Tokenizer) -> None:
    def talk(first: str, second: str) -> list[dict[str, Any]]:
        asked = calls(call("now", call_id=first), call("now", call_id=second), content="")
        return [ASK, asked, result("1", first), result("2", second)]

    foreign = talk("call_KxV4aBcD", "toolu_01A09q90")
    mapped = talk(nine_characters("call_KxV4aBcD"), nine_characters("toolu_01A09q90"))
    assert ToolChat(v3).prompt(foreign).tokens == v3.encode_chat(mapped)


def test_v3_writes_text_and_then_calls(v3: Tokenizer) -> None:
    text = v3.encode_chat([ASK, says("assistant", "One moment."), ASK])
    only_calls = v3.encode_chat([ASK, calls(call("now"), content=""), result("1")])
    asked = v3.encode_chat([ASK])
    wanted = text[: text.index(2)] + only_calls[len(asked) :]
    assert ToolChat(v3).prompt([ASK, calls(call("now"), content="One moment."), result("1")]).tokens == wanted


@pytest.mark.parametrize(("template", "as_text"), [(AS_OBJECT, False), (AS_TEXT, True)])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_that_knows_tools_writes_them_as_in_transformers(
    chatml: MakeChatml, template: str, as_text: bool, tools: Any
) -> None:
    tokenizer = chatml(template)
    given = json.loads(json.dumps(TALK))
    for each in given[2]["tool_calls"]:
        arguments = each["function"]["arguments"]
        each["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    filled = [{**each, "function": {"name": each["function"]["name"], "description": "", "parameters": {}} | each["function"]}
              for each in tools or ()] or None  # fmt: skip
    (wanted,), _ = render_jinja_template(
        conversations=[given], tools=filled, chat_template=template, add_generation_prompt=True
    )
    assert ids(tokenizer, TALK, tools) == spelled(tokenizer, wanted)
    assert ToolChat(tokenizer).name == "hermes"


def test_chatml_without_tools_is_told_of_them(chatml: MakeChatml) -> None:
    listed = "\n".join(json.dumps(tool.definition) for tool in read_tools(TOOLS).tools)
    wanted = (
        "<|im_start|>system\nBe brief.\n\nYou can call functions. These are their definitions:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and arguments as JSON, each call between tags of its own:\n"
        '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>\n'
        "What it gives comes back between <tool_response> and </tool_response>. "
        "Call no function that is not listed, and none where you can answer without.<|im_end|>\n"
        "<|im_start|>user\nWeather in Paris?<|im_end|>\n"
        "<|im_start|>assistant\nOne moment.\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n"
        '<tool_response>\n{"name": "get_weather", "content": {"sky": "clear"}}\n</tool_response>\n'
        '<tool_response>\n{"name": "now", "content": "12:00"}\n</tool_response><|im_end|>\n'
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = chatml()
    assert ids(tokenizer, TALK, TOOLS) == spelled(tokenizer, wanted)
    definitions = wanted[wanted.index("\n\nYou can") : wanted.index("<|im_end|>")]
    assert ids(tokenizer, TALK) == spelled(tokenizer, wanted.replace(definitions, ""))


def test_8x7b_is_asked_for_json(v1: Tokenizer) -> None:
    wanted = (
        "<s> [INST] Be brief.\n\nYou can call tools. These are their definitions:\n"
        '{"name": "now", "description": "", "parameters": {}}\n'
        "To call tools, answer with this JSON and nothing else, one entry for each call:\n"
        '{"tool_calls": [{"name": "…", "arguments": {…}}]}\n'
        'What they give comes back as {"tool_results": […]}. '
        "Call no tool that is not listed. Where you can answer without a tool, answer in plain text.\n\n"
        "Weather in Paris? [/INST] One moment.\n\n"
        '{"tool_calls": [{"name": "get_weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": {}}]}</s>'
        ' [INST] {"tool_results": [{"name": "get_weather", "content": {"sky": "clear"}}, {"name": "now", "content": "12:00"}]}'
        "\n\nAnd? [/INST]"
    )
    assert shown(v1, ids(v1, TALK, [NOW])) == wanted
    assert ToolChat(v1).name == "generic"


ORDERS: dict[str, list[dict[str, Any]]] = {
    "user, user": [says("user", "Eins"), says("user", "Zwei")],
    "tool, user": [ASK, calls(call("now")), result("Eins"), says("user", "Zwei")],
    "developer": [says("developer", "Eins"), says("user", "Zwei")],
    "two systems": [says("system", "Eins"), says("developer", "Zwei"), ASK],
    "system in the middle": [ASK, says("assistant", "Eins"), says("system", "Zwei"), says("user", "Drei")],
    "system between": [says("user", "Eins"), says("system", "Zwei"), says("user", "Drei")],
    "system last": [ASK, says("assistant", "Eins"), says("system", "Zwei")],
    "system alone": [says("system", "Eins")],
    "text beside calls": [ASK, calls(call("now"), content="Eins"), result("Zwei")],
    "parts": [says("user", [{"type": "text", "text": "Eins"}, {"type": "text", "text": "Zwei"}])],
    "assistant last": [ASK, says("assistant", "Eins")],
    "assistant last after a result": [ASK, calls(call("now")), result("Eins"), says("assistant", "Zwei")],
    "assistant first": [says("assistant", "Eins"), says("user", "Zwei")],
    "assistant alone": [says("assistant", "Eins")],
    "two assistants": [ASK, says("assistant", "Eins"), says("assistant", "Zwei"), says("user", "Drei")],
    "calls without results": [ASK, calls(call("now"), content="Eins"), says("user", "Zwei")],
    "result without a call": [result("Eins"), says("user", "Zwei")],
}  # fmt: skip
FAMILIES = ["chatml", "llama-3", "phi-3", "zephyr", "gemma", "openchat", "llama-2", "vicuna", "alpaca", "mistral-v1"]


def family(make_folder: FolderMaker, name: str) -> Tokenizer:
    return load_tokenizer(make_folder("tiny"), chat_template=given_template(name))


@pytest.mark.parametrize("name", [*FAMILIES, STRICT, AS_OBJECT, AS_TEXT], ids=[*FAMILIES, "strict", "object", "text"])
def test_every_format_takes_every_order_of_roles(make_folder: FolderMaker, name: str) -> None:
    tokenizer = family(make_folder, name)
    chat = ToolChat(tokenizer)
    for (order, messages), tools in zip(ORDERS.items(), itertools.cycle([TOOLS, None]), strict=False):
        text = shown(tokenizer, chat.prompt(messages, read_tools(tools)).tokens)
        for word in ("Eins", "Zwei", "Drei"):
            assert text.count(word) == str(messages).count(f"'{word}'"), (order, word, text)


def test_every_order_of_roles_in_v3(v3: Tokenizer) -> None:
    chat = ToolChat(v3)
    for order, messages in ORDERS.items():
        text = shown(v3, chat.prompt(messages, read_tools(TOOLS)).tokens)
        for word in ("Eins", "Zwei", "Drei"):
            assert text.count(word) == str(messages).count(f"'{word}'"), (order, word, text)


@pytest.mark.parametrize("name", ["llama-2", "vicuna", "alpaca", "gemma"])
def test_what_a_format_cannot_tell_from_the_assistant_is_not_written_as_it(make_folder: FolderMaker, name: str) -> None:
    tokenizer = family(make_folder, name)
    first = tokenizer.encode_chat([says("system", "Zwei"), ASK, says("assistant", "Eins"), says("user", "Drei")])
    assert ids(tokenizer, ORDERS["system in the middle"]) == first
    talk = [ASK, calls(call("now")), result("12")]
    wanted = [ASK, says("assistant", '{"tool_calls": [{"name": "now", "arguments": {}}]}'),
              says("user", '{"tool_results": [{"name": "now", "content": 12}]}')]  # fmt: skip
    assert ids(tokenizer, talk) == tokenizer.encode_chat(wanted)


@pytest.mark.parametrize("name", ["chatml", "mistral-v1"])
def test_an_answer_goes_on_from_the_assistants_text(make_folder: FolderMaker, name: str) -> None:
    tokenizer = family(make_folder, name)
    chat = ToolChat(tokenizer)
    begun = chat.prompt([ASK, says("assistant", "It is ")])
    asked = chat.prompt([ASK])
    assert begun.tokens[: len(asked.tokens)] == asked.tokens
    assert (begun.begun, asked.begun) == ("It is", "")
    assert tokenizer.decode(begun.tokens[len(asked.tokens) :]) == "It is"
    with pytest.raises(InvalidRequestError, match=r"^messages: the last one is the assistant's"):
        chat.prompt([ASK, says("assistant", "It is ")], answer=JsonObject())


def test_tool_choice_leaves_the_prompt_as_it_is_unless_it_is_none(v1: Tokenizer) -> None:
    chat = ToolChat(v1)
    auto = chat.prompt([ASK], read_tools(TOOLS)).tokens
    assert chat.prompt([ASK], read_tools(TOOLS, "required")).tokens == auto
    assert chat.prompt([ASK], read_tools(TOOLS, {"function": {"name": "now"}})).tokens == auto
    assert chat.prompt([ASK], read_tools(TOOLS, "none")).tokens == chat.prompt([ASK]).tokens == v1.encode_chat([ASK])


def test_the_way_of_writing_calls_follows_the_chat_format(
    v1: Tokenizer, v3: Tokenizer, chatml: MakeChatml, make_folder: FolderMaker
) -> None:
    assert [ToolChat(each).name for each in (v1, v3, chatml(), chatml(AS_OBJECT))] == [
        "generic",
        "mistral",
        "hermes",
        "hermes",
    ]
    for name, way in (("chatml", "hermes"), ("llama-3", "generic"), ("alpaca", "generic")):
        assert ToolChat(family(make_folder, name)).name == way
    assert [ToolChat(v3, way).name for way in ("hermes", "generic", "none")] == ["hermes", "generic", "none"]
    with pytest.raises(InvalidRequestError, match=r"tools mistral needs the control token \[TOOL_CALLS\]"):
        ToolChat(v1, "mistral")
    with pytest.raises(InvalidRequestError, match="tools is 'llama'; it must be one of auto, mistral, hermes"):
        ToolChat(v1, "llama")


def test_another_way_than_the_formats_own_goes_into_texts(v3: Tokenizer) -> None:
    text = shown(v3, ids(v3, TALK, [WEATHER], "hermes"))
    assert "[TOOL_CALLS]" not in text
    assert "[TOOL_RESULTS]" not in text
    assert "</tool_call></s>[INST] Be brief.\n\nYou can call functions." in text  # before the last question, in v3
    assert '<tool_response>\n{"name": "get_weather", "content": {"sky": "clear"}}' in text


def test_without_tools_a_request_for_them_is_refused(v3: Tokenizer) -> None:
    chat = ToolChat(v3, "none")
    with pytest.raises(InvalidRequestError, match=r"^tools: this model is served without tools"):
        chat.prompt([ASK], read_tools(TOOLS))
    prompt = chat.prompt([ASK], read_tools(TOOLS, "none"))
    assert (prompt.tokens, prompt.constraint) == (v3.encode_chat([ASK]), None)
