"""The parser of answers: the same for every way of cutting them into pieces, and what json.loads finds in the whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.calls.generic import GenericCalls
from mlx_mixtral.calls.markup import Delimiters
from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd, CallParser, Event, TextDelta

BY_ID = Delimiters(begin_id=5)
TAGS = Delimiters(begin=("<tool_call>",), is_list=False, end=("</tool_call>",))
TAG_IDS = Delimiters(begin_id=5, is_list=False, end_id=6)
JSON = GenericCalls.delimiters
KINDS = {"list by id": BY_ID, "tags": TAGS, "tags by id": TAG_IDS, "json": JSON}
NAMES = {"f", "get_weather", "größe"}
BEGIN, END = "\x05", "\x06"
"""Stand for the control tokens 5 and 6 in the texts of these tests."""

Read = tuple[str, list[tuple[str, str]], list[str]]


def read(kind: Delimiters, pieces: Iterable[str], *, was_cut: bool = False, **more: Any) -> Read:
    """Text, whole calls, and the order of events with all pieces that belong together as one."""
    numbers = itertools.count()
    parser = CallParser(kind, NAMES, make_id=lambda: f"id{next(numbers)}", **more)
    events: list[Event] = []
    for piece in pieces:
        rest = piece
        while rest:
            at = next((i for i, char in enumerate(rest) if char in BEGIN + END), None)
            if at is None:
                events += parser.add(rest)
                break
            events += parser.add(rest[:at], 5 if rest[at] == BEGIN else 6)
            rest = rest[at + 1 :]
    events += parser.finish(was_cut=was_cut)
    order: list[str] = []
    streamed: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallBegin):
            streamed[event.index] = ""
        if isinstance(event, ArgumentsDelta):
            streamed[event.index] += event.text
        name = f"{type(event).__name__} {getattr(event, 'index', '')}"
        if not order or order[-1] != name:
            order.append(name)
    ended = [event.index for event in events if isinstance(event, CallEnd)]
    assert [each.arguments for each in parser.calls] == [streamed[index] for index in ended]
    begun = {event.index: event.id for event in events if isinstance(event, CallBegin)}
    assert [each.id for each in parser.calls] == [begun[index] for index in ended]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [(each.name, each.arguments) for each in parser.calls], order


def written(kind: Delimiters, calls: Sequence[dict[str, Any]], **style: Any) -> str:
    """Calls as a model of the kind writes them."""
    dumped = [json.dumps(each, **style) for each in calls]
    if kind is BY_ID:
        return f"{BEGIN} [{', '.join(dumped)}]"
    if kind is JSON:
        return json.dumps({"tool_calls": list(calls)}, **style)
    begin, end = ("<tool_call>", "</tool_call>") if kind is TAGS else (BEGIN, END)
    return "\n".join(f"{begin}\n{each}\n{end}" for each in dumped)


def splits(text: str) -> Iterable[list[str]]:
    """Every way of cutting a text in two or three, and into single characters."""
    yield [text]
    yield list(text)
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        yield [text[:first], text[first:second], text[second:]]


PARIS = {"name": "get_weather", "arguments": {"city": 'P"a}r]is\\', "days": [1, {"a": None}]}}
EMPTY = {"name": "f", "arguments": {}}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_cut_in_three_reads_the_same(kind: Delimiters) -> None:
    one = {"name": "f", "arguments": {"a": '}"\\'}}
    text = written(kind, [one], separators=(",", ":"))
    wanted = [("f", json.dumps(one["arguments"], separators=(",", ":")))]
    order = ["CallBegin 0", "ArgumentsDelta 0", "CallEnd 0"]
    for pieces in splits(text):
        assert read(kind, pieces) == ("", wanted, order), pieces


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(sorted(NAMES)), "arguments": st.dictionaries(st.text(), VALUES, max_size=4)}
    ),
    min_size=1,
    max_size=3,
)
TEXTS = (
    st.text(st.characters(exclude_characters=BEGIN + END)).map(str.strip).filter(lambda text: "<tool_call>" not in text)
)
ODD_TEXTS = st.text(st.sampled_from('<tool_call>{}[]":,\\ \nabx/' + BEGIN + END), max_size=40)
STYLES = st.fixed_dictionaries({"ensure_ascii": st.booleans(), "indent": st.sampled_from([None, 1])})


def cut(text: str, places: list[float]) -> list[str]:
    at = sorted({0, len(text), *(int(place * len(text)) for place in places)})
    return [text[first:second] for first, second in itertools.pairwise(at)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(
    before=TEXTS,
    calls=CALLS,
    style=STYLES,
    after=st.sampled_from(["", "\n", " \n\n"]),
    places=st.lists(st.floats(0, 1)),
)
def test_what_was_written_is_read_however_it_is_cut(
    kind: Delimiters, before: str, calls: list[dict[str, Any]], style: dict[str, Any], after: str, places: list[float]
) -> None:
    before = "" if kind is JSON else before
    text = f"{before}\n{written(kind, calls, **style)}{after}" if before else written(kind, calls, **style) + after
    shown, found, order = read(kind, cut(text, places))
    assert (shown, [(name, json.loads(arguments)) for name, arguments in found]) == (
        before,
        [(each["name"], each["arguments"]) for each in calls],
    )
    assert (shown, found, order) == read(kind, list(text))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(text=ODD_TEXTS, places=st.lists(st.floats(0, 1)))
def test_anything_at_all_reads_the_same_however_it_is_cut(kind: Delimiters, text: str, places: list[float]) -> None:
    for was_cut in (True, False):
        assert read(kind, cut(text, places), was_cut=was_cut) == read(kind, list(text), was_cut=was_cut)


@given(text=st.text(st.characters(exclude_characters=BEGIN + END)), places=st.lists(st.floats(0, 1)))
def test_text_without_calls_is_itself(text: str, places: list[float]) -> None:
    assert read(BY_ID, cut(text, places))[:2] == (text, [])


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (TAGS, "a <b> <tool_cal> x", "a <b> <tool_cal> x"),
        (TAGS, "<tool_call> is how calls begin", "<tool_call> is how calls begin"),
        (TAGS, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None),
        (TAGS, "<", "<"),
        (BY_ID, '[TOOL_CALLS] [{"name": "f", "arguments": {}}]', None),
        (BY_ID, f'{BEGIN}[{{"name": "nobody"', '[{"name": "nobody"'),
        (JSON, '{"tool_calls": "none"}', None),
        (JSON, '{"tool_calls": [{"name": "nobody", "arguments": {}}]}', None),
        (JSON, ' {"answer": 1}', None),
        (JSON, 'Here: {"tool_calls": [{"name": "f", "arguments": {}}]}', None),
        (JSON, "{", "{"),
    ],
)
def test_what_looks_like_calls_and_is_none_is_text(kind: Delimiters, text: str, shown: str | None) -> None:
    assert read(kind, list(text))[:2] == (text if shown is None else shown, [])


@pytest.mark.parametrize(
    ("item", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"id": "123456789", "name": "f", "arguments": {"a": 1}, "n": -1.5e3, "x": [{"}": 1}]}', '{"a": 1}'),
        ('{"n": 3 ,"\\u006eame" : "f","arguments":{ "a":1 } }', '{ "a":1 }'),
    ],
)
@pytest.mark.parametrize("kind", [BY_ID, TAGS], ids=["list by id", "tags"])
def test_forms_that_models_write_of_their_own_accord_are_read(kind: Delimiters, item: str, arguments: str) -> None:
    text = f"{BEGIN}[{item}]" if kind is BY_ID else f"<tool_call>{item}</tool_call>"
    assert read(kind, list(text))[:2] == ("", [("f", arguments)])


def test_arguments_are_passed_on_as_they_are_written() -> None:
    parser = CallParser(BY_ID, NAMES, make_id=lambda: "abcdefghi")
    assert parser.add("", 5) == []
    assert parser.add(' [{"name": "f", "argu') == [CallBegin(0, "abcdefghi", "f")]
    assert parser.add('ments": {"a') == [ArgumentsDelta(0, '{"a')]
    assert parser.add('": 1') == [ArgumentsDelta(0, '": 1')]
    assert parser.add("}}") == [ArgumentsDelta(0, "}"), CallEnd(0)]
    assert parser.add("]") == parser.finish(was_cut=False) == []


def test_text_is_passed_on_as_soon_as_it_begins_no_call() -> None:
    parser = CallParser(TAGS, NAMES)
    assert parser.add("Let me <too") == [TextDelta("Let me")]
    assert parser.add("th>") == [TextDelta(" <tooth>")]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_answer_that_is_cut_has_no_half_call(kind: Delimiters) -> None:
    text = written(kind, [PARIS, EMPTY])
    whole = [("get_weather", json.dumps(PARIS["arguments"])), ("f", "{}")]
    for length in range(len(text)):
        shown, found, _ = read(kind, list(text[:length]), was_cut=True)
        assert found == whole[: len(found)], text[:length]
        assert all(json.loads(arguments) is not None for _, arguments in found)
        assert len(shown) <= 1, text[:length]


def test_the_beginning_of_a_cut_call_was_passed_on_without_its_end() -> None:
    _, found, order = read(BY_ID, [BEGIN + '[{"name": "f", "arguments": {"a": "b'], was_cut=True)
    assert (found, order) == ([], ["CallBegin 0", "ArgumentsDelta 0"])


def test_what_was_no_call_to_the_end_is_text_where_the_model_ended_it() -> None:
    assert read(BY_ID, [f'{BEGIN}[{{"nam']) == ('[{"nam', [], ["TextDelta "])
    assert read(BY_ID, [f'{BEGIN}[{{"nam'], was_cut=True) == ("", [], [])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_calls_beyond_the_limit_are_passed_over(kind: Delimiters) -> None:
    assert read(kind, list(written(kind, [EMPTY, PARIS, PARIS])), max_calls=1)[:2] == ("", [("f", "{}")])


def test_text_may_follow_calls() -> None:
    tags = written(TAGS, [EMPTY]) + "\n\nDone.\n" + written(TAGS, [EMPTY])
    assert read(TAGS, list(tags))[:2] == ("Done.", [("f", "{}")] * 2)
    assert read(BY_ID, list(written(BY_ID, [EMPTY]) + " Done."))[:2] == ("Done.", [("f", "{}")])
    assert read(BY_ID, list(f"{BEGIN}[{json.dumps(EMPTY)}, nonsense"))[:2] == (", nonsense", [("f", "{}")])


def test_without_delimiters_all_is_text() -> None:
    text = written(TAGS, [EMPTY])
    assert CallParser(None).add(text, 5) == [TextDelta(text)]
