"""A hub that lies: each lie is one HubError within a time limit, little is read, and nothing is written but to the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.hub import wrong_results
from tests.hub.asking import ask_all
from tests.hub.lying_server import APIS, BODIES, CONFIG, HEADS, LISTINGS, serve

EXPECTED = {
    **{name: words for name, (_, words) in LISTINGS.items()},
    **{name: words for name, (_, _, words) in HEADS.items()},
    **{name: words for name, (_, words) in BODIES.items()},
    **{name: words for name, (_, words) in APIS.items()},
}
# A lie that costs only bytes which are not read.
HARMLESS = [name for name, words in EXPECTED.items() if not words]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], dict[str, int]]]:
    """Every lie told to one process."""
    place = tmp_path_factory.mktemp("lies") / "a" / "b" / "c" / "d"
    with serve(outside=place.parent / "absolute") as hub:
        yield place, ask_all(hub.url, place / "home", list(EXPECTED)), dict(hub.sent)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_lie_is_one_line(asked: tuple[Path, dict[str, Any], dict[str, int]], name: str) -> None:
    result = asked[1]["results"][name]
    if name in HARMLESS:
        assert Path(result["folder"], "config.json").stat().st_size == len(CONFIG)
        return
    assert "wrong" not in result
    message = result["message"]
    assert message.startswith(f"owner/{name}")
    assert "\n" not in message
    assert len(message) < 500
    assert EXPECTED[name] in message


def test_nothing_is_written_but_to_the_cache(asked: tuple[Path, dict[str, Any], dict[str, int]]) -> None:
    place = asked[0]
    top = place.parents[3]
    outside = [path for path in top.rglob("*") if not path.is_relative_to(place / "home") and not path.is_dir()]
    assert outside == []
    repositories = place / "home" / "hub"
    kinds = {path.name for folder in repositories.glob("models--*") for path in folder.iterdir()}
    assert kinds <= {"blobs", "refs", "snapshots"}
    for folder in repositories.glob("models--*"):
        name = folder.name.removeprefix("models--owner--")
        whole = [path.name for path in folder.glob("snapshots/*/*")]
        assert name in HARMLESS or "config.json" not in whole


def test_little_more_is_read_than_a_file_has(asked: tuple[Path, dict[str, Any], dict[str, int]]) -> None:
    """Sockets buffer some megabytes that the server has sent and nobody reads."""
    assert {
        name: sent for name, sent in asked[2].items() if sent > 40 * 2**20 and name not in ("api-endless", "large")
    } == {}
    assert asked[1]["peak"] < 600_000


def test_a_short_part_of_the_campaign_of_bent_answers() -> None:
    """Among them a cookie that is no ASCII, which every later request would have carried."""
    outcomes = Counter[str]()
    assert wrong_results(range(200, 236), outcomes) == {}
    assert set(outcomes) == {"files", "HubError"}


def test_nothing_else_is_asked_for(asked: tuple[Path, dict[str, Any], dict[str, int]]) -> None:
    """The hub's client has requests of its own."""
    assert set(asked[2]) <= set(EXPECTED)


def test_it_is_said_what_is_waited_for(asked: tuple[Path, dict[str, Any], dict[str, int]]) -> None:
    said = asked[1]["said"]
    assert "waiting for the hub to answer: the list of files of owner/api-silent" in said
    assert any(line.startswith("waiting for the hub: config.json (") for line in said)
