"""One piece over a connection that breaks all the time: where it resumes, how long it waits, when it gives up."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlx_mixtral.errors import HubError
from mlx_mixtral.hub import ranges
from mlx_mixtral.hub.answers import HubAnswer
from mlx_mixtral.hub.listing import Listing, RemoteFile
from mlx_mixtral.hub.ranges import RangeReader

DATA = bytes(range(40))


class Body:
    """What the session's answer is, as far as ``HubAnswer`` reads it."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self.iter_raw = parts.__iter__


def answer(status: int, headers: dict[str, str], parts: Iterable[bytes]) -> HubAnswer:
    return HubAnswer(status, headers, (), Body(parts))


@dataclass
class Drip:
    """Serves ``parts[n]`` bytes of the ``n``th request, the last entry ever after; None is status 503."""

    parts: list[int | None]
    starts: list[int] = field(default_factory=list)
    wait: str = ""

    @contextlib.contextmanager
    def ask(self, url: str, what: str, *, headers: dict[str, str], **options: Any) -> Iterator[HubAnswer]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"])
        assert asked is not None
        start, end = int(asked[1]), int(asked[2])
        part = self.parts[min(len(self.starts), len(self.parts) - 1)]
        self.starts.append(start)
        if part is None:
            yield answer(503, {"Retry-After": self.wait}, [])
            return
        # A server that sends more than was asked for must not write past the piece.
        yield answer(206, {"Content-Range": f"bytes {start}-{end}/{len(DATA)}"}, [DATA[start : start + part], b""])


def read(drip: Drip, monkeypatch: pytest.MonkeyPatch, start: int = 0, count: int = 40) -> tuple[bytes, list[float]]:
    """Bytes read, and the seconds waited in between."""
    reader = RangeReader(Listing("owner/model", "c" * 40, {"file": RemoteFile(len(DATA), None)}))
    monkeypatch.setattr(reader, "_client", drip)
    waits: list[float] = []
    monkeypatch.setattr(reader._stopped, "wait", waits.append)
    buffer = bytearray(count)
    with contextlib.closing(reader):
        reader.read_into("file", memoryview(buffer), start)
    assert reader.received_bytes == count
    assert reader.retries == len(waits)
    return bytes(buffer), waits


def test_a_drip_is_resumed_as_long_as_anything_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = Drip([3])
    data, waits = read(drip, monkeypatch)
    assert data == DATA
    assert drip.starts == list(range(0, 40, 3))
    assert len(drip.starts) > ranges.ATTEMPTS
    assert waits == [ranges.WAIT_S] * 13


def test_waits_double_while_nothing_arrives_and_start_over_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = Drip([None, None, None, 5, None, 40])
    data, waits = read(drip, monkeypatch, 10, 20)
    assert data == DATA[10:30]
    assert drip.starts == [10, 10, 10, 10, 15, 15]
    assert waits == [0.5, 1.0, 2.0, 0.5, 1.0]


def test_the_hub_may_ask_for_a_longer_wait_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(Drip([None, 40], wait="7"), monkeypatch)[1] == [7.0]
    assert read(Drip([None, 40], wait="86400"), monkeypatch)[1] == [ranges.MAX_ASKED_S]
    assert read(Drip([None, 40], wait="Wed, 21 Oct 2026"), monkeypatch)[1] == [ranges.WAIT_S]


def test_it_gives_up_after_so_many_attempts_that_bring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = Drip([5, None])
    with pytest.raises(HubError, match=r"^file cannot be fetched at 5 B, 8 attempts failed \(status 503\)"):
        read(drip, monkeypatch)
    # The first attempt that brought nothing follows one that was cut short.
    assert drip.starts == [0] + [5] * (ranges.ATTEMPTS - 1)


def test_several_pieces_end_up_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 7)
    assert read(Drip([4]), monkeypatch, 1, 38)[0] == DATA[1:39]


def test_more_than_was_asked_for_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Drip):
        @contextlib.contextmanager
        def ask(self, *arguments: Any, headers: dict[str, str], **options: Any) -> Iterator[HubAnswer]:
            with super().ask(*arguments, headers=headers, **options) as given:
                yield answer(206, given.headers, itertools.chain([DATA[:7]], itertools.repeat(b"more")))

    assert read(Endless([40]), monkeypatch)[0][:8] == DATA[:7] + b"m"


def test_a_connection_that_breaks_all_the_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MAX_BREAKS", 10)
    drip = Drip([1])
    with pytest.raises(HubError, match=r"file cannot be fetched at 10 B, 10 attempts failed \(30 bytes did not arrive"):
        read(drip, monkeypatch)
    assert len(drip.starts) == 10


def test_pieces_come_in_order_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 3)
    reader = RangeReader(Listing("owner/model", "c" * 40, {"file": RemoteFile(len(DATA), None)}))
    drip = Drip([40])
    monkeypatch.setattr(reader, "_client", drip)
    with contextlib.closing(reader):
        pieces = reader.pieces("file", 5, 38)
        assert bytes(next(pieces)) == DATA[5:8]
        assert DATA[8:38] == b"".join(pieces)
    assert sorted(drip.starts) == list(range(5, 38, 3))
