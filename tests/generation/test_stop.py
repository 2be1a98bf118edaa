"""Stop strings over streams cut anywhere, against looking for them in the whole text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.stop import StopStrings

small = st.text(alphabet="ab", max_size=12)


def _feed(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopStrings(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.add(piece))
        if matcher.is_stopped():
            return shown, True
    return [*shown, matcher.finish()], False


@given(pieces=st.lists(small, max_size=6), stops=st.lists(small.filter(bool), max_size=3))
def test_any_cut_shows_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = _feed(pieces, stops)
    text = "".join(pieces)
    # Cut where the stream was first known to hold a stop string: later pieces are never asked for.
    known = next((n for n in range(len(pieces) + 1) if any(s in "".join(pieces[:n]) for s in stops)), None)
    if known is None:
        assert not stopped
        assert "".join(shown) == text
    else:
        upto = "".join(pieces[:known])
        assert stopped
        assert "".join(shown) == upto[: min(upto.find(s) for s in stops if s in upto)]


@given(pieces=st.lists(small, max_size=6), stops=st.lists(small.filter(bool), min_size=1, max_size=3))
def test_nothing_is_shown_that_could_be_part_of_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = seen = ""
    for piece in pieces:
        seen += piece
        shown += matcher.add(piece)
        if matcher.is_stopped():
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        # All that is held begins a stop string, and no shown end does.
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(seen.endswith(stop[:n]) and n > len(held) for stop in stops for n in range(1, len(stop)))


@given(pieces=st.lists(small, max_size=6), stops=st.lists(small.filter(bool), min_size=1, max_size=3))
def test_the_stop_that_matched_is_the_one_that_begins_first(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    seen = ""
    for piece in pieces:
        matcher.add(piece)
        seen += piece
        if matcher.is_stopped():
            # Python's alternation takes the leftmost place, and there the first that fits.
            found = re.search("|".join(map(re.escape, stops)), seen)
            assert found is not None
            assert matcher.matched == found.group()
            return
    assert matcher.matched is None


def test_without_stops_everything_passes_at_once() -> None:
    matcher = StopStrings([])
    assert matcher.add("hello") == "hello"
    assert matcher.finish() == ""


@pytest.mark.parametrize("bad", ["", 3])
def test_bad_stop_strings_are_errors(bad: object) -> None:
    with pytest.raises(InvalidRequestError, match="stop string"):
        StopStrings([bad])  # type: ignore[list-item]
