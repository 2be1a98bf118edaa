"""Answers read as blocks, however they come in pieces: against the blocks of the text that was written."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.calls.markup import Delimiters
from mlx_mixtral.calls.parser import CallParser, TextDelta
from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.wire.blocks import BlockReader, Change

CALLS = Delimiters(begin=("<c>",), end=("</c>",), is_list=False)
NOW = '<c>{"name": "now", "arguments": {"a": [1, "}"]}}</c>'
LATER = '<c>{"name": "later", "arguments": {}}</c>'
PIECE = 12
NOW_BLOCK, LATER_BLOCK = ("now", '{"a": [1, "}"]}'), ("later", "{}")


def _read(pieces: Sequence[str]) -> tuple[BlockReader, list[tuple[str | None, str, bool]]]:
    """The reader, and the blocks that its steps say: name, text, and whether it ended before the next began."""
    parser, reader = CallParser(CALLS, {"now", "later"}), BlockReader()
    told: list[tuple[str | None, str, bool]] = []
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        events = parser.add(piece, None) + (parser.finish(was_cut=False) if is_last else [])
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        calls = tuple(event for event in events if not isinstance(event, TextDelta))
        for step in reader.add(Chunk(text, 5, finish_reason="stop" if is_last else None, call_events=calls)):
            if step.change is Change.BEGAN:
                assert all(ended for *_, ended in told)
                told.append((None if step.block.call is None else step.block.call.name, "", False))
            else:
                name, so_far, _ = told.pop()
                assert step.block.index == len(told)
                told.append((name, so_far + step.text, step.change is Change.ENDED))
    return reader, told


@given(st.data())
@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", [(None, "")]),
        ("Only words.", [(None, "Only words.")]),
        (NOW, [NOW_BLOCK]),
        (NOW + LATER + NOW, [NOW_BLOCK, LATER_BLOCK, NOW_BLOCK]),
        (f"Let me see.{NOW}", [(None, "Let me see."), NOW_BLOCK]),
        (f"Well,{LATER}and{NOW}", [(None, "Well,"), LATER_BLOCK, (None, "and"), NOW_BLOCK]),
        ('<c>{"name": "never", "arguments": {}}</c>', [(None, '<c>{"name": "never", "arguments": {}}</c>')]),
    ],
    ids=["nothing", "text", "call", "calls", "text and call", "in turn", "no tool"],
)
def test_blocks_are_the_same_however_an_answer_is_cut(
    text: str, blocks: list[tuple[str | None, str]], data: st.DataObject
) -> None:
    # Pieces are short, as tokens are: none holds the end of a call, text, and the name of the next call.
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = [piece[at : at + PIECE] for piece in pieces for at in range(0, max(1, len(piece)), PIECE)]
    reader, told = _read(pieces)
    assert told == [(name, said, True) for name, said in blocks]
    whole = [(None if block.call is None else block.call.name, block.text) for block in reader.whole_blocks]
    assert whole == blocks
    assert reader.has_calls == any(name for name, _ in blocks)
