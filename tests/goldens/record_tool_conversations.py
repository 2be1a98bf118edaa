"""Record tool_conversations.json: conversations as clients send them, and the ids of what they say in Mistral's v3 format.

    python tests/goldens/record_tool_conversations.py

mistral-common refuses most of these orders of roles, so each is written down a second time in one that it takes and that says
the same; the ids are those of the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

Message = dict[str, Any]


def says(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def calls(*functions: tuple[str, Any, str], content: str | None = "") -> Message:
    written = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for n, a, i in functions]
    return says("assistant", content, tool_calls=written)


def result(text: Any, call_id: str, **more: Any) -> Message:
    return says("tool", text, tool_call_id=call_id, **more)


CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Ville"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY},
}
NOW = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
PARIS = ("get_weather", '{"city": "Paris"}', "abcdefghi")
ROME = ("get_weather", '{"city": "Rome"}', "abcdefgh2")
ASK, SUNNY = says("user", "Weather in Paris?"), '{"sky": "clear"}'

# Name, as a client sends it, as mistral-common takes it, tools.
CONVERSATIONS: list[tuple[str, list[Message], list[Message], list[Message]]] = [
    (
        "definitions",
        [says("developer", "Be brief."), ASK],
        [says("system", "Be brief."), ASK],
        [WEATHER, NOW],
    ),
    (
        "strict and no description",
        [ASK],
        [ASK],
        [{"type": "function", "function": {"name": "now", "strict": True}}],
    ),
    (
        "call and result",
        [ASK, calls(PARIS, content=None), result(SUNNY, "abcdefghi")],
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi")],
        [WEATHER],
    ),
    (
        "user after the result",
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi"), says("user", "And?")],
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi"), says("user", "And?")],
        [WEATHER],
    ),
    (
        "system in the middle",
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi"), says("assistant", "Clear."), says("system", "Rhyme."), ASK],
        [says("system", "Rhyme."), ASK, calls(PARIS), result(SUNNY, "abcdefghi"), says("assistant", "Clear."), ASK],
        [WEATHER],
    ),
    (
        "system after the result",
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi"), says("system", "Rhyme.")],
        [says("system", "Rhyme."), ASK, calls(PARIS), result(SUNNY, "abcdefghi")],
        [WEATHER],
    ),
    (
        "two users, parts of text",
        [says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), says("user", "c")],
        [says("user", "a\n\nb\n\nc")],
        [NOW],
    ),
    (
        "result in parts",
        [ASK, calls(PARIS), result([{"type": "text", "text": '{"sky":'}, {"type": "text", "text": ' "clear"}'}], "abcdefghi")],
        [ASK, calls(PARIS), result(SUNNY, "abcdefghi")],
        [WEATHER],
    ),
    (
        "results in another order, and late",
        [ASK, calls(PARIS, ROME), result("2", "abcdefgh2"), says("user", "Well?"), result("1", "abcdefghi")],
        [ASK, calls(PARIS, ROME), result("2", "abcdefgh2"), result("1", "abcdefghi"), says("user", "Well?")],
        [WEATHER],
    ),
    (
        "a result is missing",
        [ASK, calls(PARIS, ROME), result("1", "abcdefghi"), says("user", "Never mind.")],
        [
            ASK, calls(PARIS, ROME), result("1", "abcdefghi"), result("There is no result.", "abcdefgh2"),
            says("user", "Never mind."),
        ],
        [WEATHER],
    ),
    (
        "a result of no call",
        [result(SUNNY, "zzzzzzzzz"), ASK],
        [says("user", SUNNY), ASK],
        [WEATHER],
    ),
    (
        "an empty answer",
        [says("user", "a"), says("assistant", ""), says("user", "b"), says("assistant", None)],
        [says("user", "a"), says("user", "b")],
        [],
    ),
    (
        "the assistant first",
        [says("assistant", "Hello"), says("user", "Hi")],
        [says("user", ""), says("assistant", "Hello"), says("user", "Hi")],
        [],
    ),
    (
        "the assistant last",
        [says("user", "Count."), says("assistant", "One, two, ")],
        [says("user", "Count."), says("assistant", "One, two,", prefix=True)],
        [],
    ),
    (
        "arguments as an object, and none",
        [ASK, calls(("get_weather", {"city": "Paris"}, "abcdefghi"), ("now", None, "abcdefgh2")),
         result("1", "abcdefghi"), result("", "abcdefgh2")],
        [ASK, calls(PARIS, ("now", "{}", "abcdefgh2")), result("1", "abcdefghi"), result("", "abcdefgh2")],
        [WEATHER, NOW],
    ),
]  # fmt: skip


def main() -> None:
    tokenizer = MistralTokenizer.v3()
    serving = MistralTokenizer(
        tokenizer.instruct_tokenizer,
        validator=type(tokenizer._chat_completion_request_validator)(mode=ValidationMode.serving),
        request_normalizer=tokenizer._instruct_request_normalizer,
    )
    recorded = []
    for name, sent, taken, tools in CONVERSATIONS:
        defined = [{**tool, "function": {"parameters": {}} | tool["function"]} for tool in tools] or None
        request = ChatCompletionRequest(model="mixtral", messages=taken, tools=defined)  # type: ignore[type-var]
        ids = serving.encode_chat_completion(request).tokens
        recorded.append({"name": name, "messages": sent, "tools": tools, "v3": ids})
    path = Path(__file__).with_name("tool_conversations.json")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in recorded)
    path.write_text(
        f'{{"mistral_common": "{mistral_common.__version__}", "conversations": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    print(f"{len(recorded)} conversations in {path.name}")


if __name__ == "__main__":
    main()
