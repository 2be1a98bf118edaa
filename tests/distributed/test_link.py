"""Messages between machines, what loading agrees on, and connections that are watched, without other processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_mixtral.distributed import neighbours
from mlx_mixtral.distributed.group import Group
from mlx_mixtral.distributed.link import OPS, PACKET, Link, records
from mlx_mixtral.distributed.meeting import agree, same
from mlx_mixtral.distributed.neighbours import Neighbours
from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.errors import CheckpointError, GroupError


class Cache:
    """Any cache."""


class Recorded(Group):
    """A leader whose sums are kept: what the others would receive."""

    def __init__(self) -> None:
        super().__init__(mx.distributed.init(), 60.0)
        self.sent: list[list[int]] = []

    def sum(self, x: mx.array) -> mx.array:
        self.sent.append(cast("list[int]", x.tolist()))
        return x


def link_of(group: Group) -> Link:
    return Link(group, [Share(0, 1, "layers", range(2), None)])


def received(sent: list[list[int]]) -> tuple[list[Any], list[int]]:
    """As ``Link.receive`` puts it together."""
    total, *numbers = sent[0]
    assert len(sent[0]) == PACKET
    if total >= PACKET:
        (numbers,) = sent[1:]
    else:
        assert len(sent) == 1
    return records(numbers[:total])


@pytest.mark.parametrize("count", [1, 40, 55, 56, 57, 58, 300])
def test_what_is_sent_is_what_is_received(count: int) -> None:
    group = Recorded()
    link, tokens = link_of(group), list(range(1000, 1000 + count))
    first, second = Cache(), Cache()
    link.made("cache", first, None, -1)
    link.made("fork", second, first, 7)
    link.did("trim", second, None, 3)
    link.did("join", second, first, True, 0, 5)
    with link.forward("hidden", first, mx.array([tokens], mx.int32), True, -1, 0) as given:
        assert given.tolist() == [tokens]
        assert given.shape == (1, count)
    found, rest = received(group.sent)
    assert found == [
        ("cache", [1, 0, -1]),
        ("fork", [2, 1, 7]),
        ("trim", [2, 0, 3]),
        ("join", [2, 1, 1, 0, 5]),
        ("hidden", [1, 1, -1, 0, 1, count]),
    ]
    assert rest == tokens


def test_a_cache_that_is_gone_is_dropped_with_the_next_message() -> None:
    group = Recorded()
    link, kept, gone = link_of(group), Cache(), Cache()
    link.made("batch", kept, None)
    link.made("extract", gone, kept, 0)
    del gone
    with link.order("end"):
        pass
    found, _ = received(group.sent)
    assert [name for name, _ in found] == ["batch", "extract", "drop", "end"]
    assert found[2] == ("drop", [2])


def test_an_error_in_a_forward_ends_the_group() -> None:
    link, cache = link_of(Recorded()), Cache()
    link.made("cache", cache, None, -1)
    with pytest.raises(CheckpointError), link.forward("step", cache, mx.zeros((1, 1), mx.int32), True):
        raise CheckpointError("an expert")
    with pytest.raises(GroupError, match="failed in the middle of a step"), link.order("end"):
        pass


def test_every_name_has_a_number_of_its_own() -> None:
    assert len(set(OPS)) == len(OPS)


def test_machines_that_differ_are_named() -> None:
    same([{"a": 1}, {"a": 1}])
    with pytest.raises(GroupError, match="rank 2 has a 3, but rank 0 has 1"):
        same([{"a": 1}, {"a": 1}, {"a": 3}])


def test_what_one_machine_finds_wrong_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Recorded()
    monkeypatch.setattr(group, "texts", lambda own: [own, '{"error": "the disk is full"}'])
    with pytest.raises(GroupError, match="rank 1: the disk is full"):
        agree(group, lambda: 5, str)

    def broken() -> int:
        raise CheckpointError("torn")

    with pytest.raises(CheckpointError, match="torn"):
        agree(group, broken, str)
    monkeypatch.setattr(group, "texts", lambda own: [own, '{"told": 7}'])
    assert agree(group, lambda: 5, lambda found: found + 1) == (5, [6, 7])


def test_a_neighbour_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 1 of 3: it accepts the machine before it at its own address, and connects to that of the one behind it."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in listening]))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    before = socket.create_connection(listening[1].getsockname())
    accepted, _ = listening[1].accept()
    behind = socket.create_connection(listening[2].getsockname())
    other, _ = listening[2].accept()
    # Only this process's ends: the others are theirs.
    monkeypatch.setattr(neighbours, "_connections", lambda: [accepted.dup(), behind.dup()])
    found = Neighbours(1, 3)
    assert found.lost() is None
    other.sendall(b"unread")
    assert found.lost() is None
    before.close()
    assert found.lost() == 0
    accepted.close()
    before = socket.create_connection(listening[1].getsockname())
    accepted, _ = listening[1].accept()
    again = Neighbours(1, 3)
    assert again.lost() is None
    behind.recv(16)
    other.close()
    assert again.lost() == 2
    monkeypatch.delenv("MLX_HOSTFILE")
    assert Neighbours(1, 3).lost() is None
    for each in (*listening, before, accepted, behind):
        each.close()
