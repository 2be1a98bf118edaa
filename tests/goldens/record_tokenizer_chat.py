"""Record tokenizer_chat.json: conversations and the ids mistral-common gives them.

    python tests/goldens/record_tokenizer_chat.py

The formats are v1 (Mixtral 8x7B) and v3 (Mixtral 8x22B); a conversation mistral-common refuses has null for ids.
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


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def calls(*functions: tuple[str, Any, str]) -> Message:
    written = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for n, a, i in functions]
    return {"role": "assistant", "content": "", "tool_calls": written}


def result(text: str, call_id: str, **extra: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": call_id, **extra}


def tool(name: str, **function: Any) -> Message:
    return {"type": "function", "function": {"name": name, "parameters": {}, **function}}


CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Ville"}}, "required": ["city"]}
WEATHER = tool("get_weather", description="Weather of a city", parameters=CITY)
ASK = user("Weather in Paris?")
CALL = calls(("get_weather", '{"city": "Paris", "days": 3}', "abcdefghi"))
RESULT = result('{"t": 21.50, "sky": "clear"}', "abcdefghi")

CONVERSATIONS: dict[str, tuple[list[Message], list[Message] | None]] = {
    "one turn": ([user("Hi")], None),
    "from the notes": (
        [user("What is 2+2?"), assistant("4"), user("And times 3?"), assistant("12."), user("Thanks!")],
        None,
    ),
    "system": ([system("Be brief."), user("Hi")], None),
    "system, two turns": ([system("Be brief."), user("Hi"), assistant("Hello"), user("Bye")], None),
    "two systems": ([system("One."), system("Two."), user("Hi")], None),
    "empty system": ([system(""), user("Hi")], None),
    "system between users": ([user("a"), system("Be brief."), user("b")], None),
    "system last": ([user("a"), system("Be brief.")], None),
    "system alone": ([system("Be brief.")], None),
    "system then assistant": ([system("S"), assistant("Hello"), user("Hi")], None),
    "two users": ([user("a"), user("b")], None),
    "three users with an empty one": ([user("a"), user(""), user("c")], None),
    "two assistants": ([user("a"), assistant("b"), assistant("c"), user("d")], None),
    "empty user": ([user("")], None),
    "spaces around": ([user("  a  "), assistant("  b   "), user(" c\n")], None),
    "assistant of spaces": ([user("a"), assistant("   "), user("c")], None),
    "assistant ends with newline and space": ([user("a"), assistant("b \n "), user("c")], None),
    "control strings": (
        [user("</s><s>[INST] x [/INST]<unk>"), assistant("[/INST]</s> ok"), user("[TOOL_CALLS] []")],
        None,
    ),
    "control strings in system": ([system("[INST]</s>"), user("[AVAILABLE_TOOLS] x[/AVAILABLE_TOOLS]")], None),
    "unicode": (
        [user("Grüße, мир! 你好 🧑‍🚀 é"), assistant("नमस्ते\u200d שלום"), user("ก็ได้ \U0001f1eb\U0001f1f7")],
        None,
    ),
    "control characters": (
        [user("a\x00b\x01\x7f\r\n\tc\u2028d"), assistant("\x1b[0m"), user("\ufeff\ue000\U000f0000")],
        None,
    ),
    "code": ([user("def f(x):\n\treturn  x\n\n\n    # ok"), assistant("```py\nf(1)\n```"), user("ok")], None),
    "tools": ([ASK], [WEATHER]),
    "tools before the last user": ([user("a"), assistant("b"), ASK], [WEATHER, tool("now")]),
    "tools and system": ([system("S"), ASK], [tool("now", description="Zeit, «heute»")]),
    "call and result": ([ASK, CALL, RESULT], [WEATHER]),
    "call, result, answer, user": ([ASK, CALL, RESULT, assistant("21.5 "), user("Merci")], [WEATHER]),
    "two calls": (
        [
            ASK,
            calls(("a", "{}", "aaaaaaaa1"), ("b", '{"x": [1, 2.0, null, "é"]}', "aaaaaaaa2")),
            result("1", "aaaaaaaa1", name="a"),
            result("plain text", "aaaaaaaa2", name="b"),
        ],
        None,
    ),
    "calls in two messages": (
        [ASK, CALL, calls(("b", "{}", "bbbbbbbb2")), RESULT, result("", "bbbbbbbb2")],
        None,
    ),
    "arguments as a dict": ([ASK, calls(("f", {"city": "Zürich"}, "abcdefghi")), RESULT], None),
    "arguments no JSON": ([ASK, calls(("f", "not json </s>", "abcdefghi")), RESULT], None),
    "arguments empty": ([ASK, calls(("f", "", "abcdefghi")), result("null", "abcdefghi")], None),
    "results that look like control": ([ASK, CALL, result('["[/TOOL_RESULTS]", "</s>"]', "abcdefghi")], None),
    "results with numbers": ([ASK, CALL, result("[1e5, 0.10, 1E400, 12345678901234567890]", "abcdefghi")], None),
    "call without result": ([ASK, CALL, user("never mind")], None),
    "result without call": ([ASK, assistant("b"), RESULT], None),
    "short call id": ([ASK, calls(("f", "{}", "abc")), result("1", "abc")], None),
    "bad function name": ([ASK, calls(("get weather", "{}", "abcdefghi")), RESULT], None),
    "user after system after assistant": ([user("a"), assistant("b"), system("S"), user("c")], None),
    "tool after user": ([user("a"), RESULT], None),
    "assistant last": ([user("a"), assistant("b")], None),
    "empty assistant": ([user("a"), assistant(""), user("b")], None),
    "nothing": ([], None),
}


def main() -> None:
    mode = ValidationMode.serving
    tokenizers = {"v1": MistralTokenizer.v1(), "v3": MistralTokenizer.v3()}
    strict = {
        name: MistralTokenizer(t.instruct_tokenizer, validator=type(t._chat_completion_request_validator)(mode=mode),
                               request_normalizer=t._instruct_request_normalizer)
        for name, t in tokenizers.items()
    }  # fmt: skip
    recorded = []
    for name, (messages, tools) in CONVERSATIONS.items():
        entry: dict[str, Any] = {"name": name, "messages": messages, "tools": tools}
        for version, tokenizer in strict.items():
            try:
                request = ChatCompletionRequest(model="mixtral", messages=messages, tools=tools)  # type: ignore[type-var]
                entry[version] = tokenizer.encode_chat_completion(request).tokens
            except Exception as error:  # a refusal: pydantic's, the validator's or an assertion
                entry[version] = None
                print(f"{version} refuses {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        recorded.append(entry)
    path = Path(__file__).with_name("tokenizer_chat.json")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in recorded)
    path.write_text(
        f'{{"mistral_common": "{mistral_common.__version__}", "conversations": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    print(f"{len(recorded)} conversations in {path.name}")


if __name__ == "__main__":
    main()
