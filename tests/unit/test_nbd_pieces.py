"""Long writes, which a server takes in pieces and puts where they lie plainly."""

from __future__ import annotations

import random

import pytest

import diskwright
from diskwright.block import around
from diskwright.block.node import Node
from diskwright.exports.nbd.plain import Plain
from diskwright.wire.nbd.numbers import Command, Flag
from tests.unit.nbd_peers import SIZE, made, running

LONG = 300_000


@pytest.fixture
def placed(monkeypatch) -> list[bool]:
    """Whether each piece could be put in its place, without the node."""
    seen: list[bool] = []
    write_piece = Plain.write_piece

    def spied(self: Plain, offset: int, payload: memoryview) -> bool:
        seen.append(write_piece(self, offset, payload))
        return seen[-1]

    monkeypatch.setattr(Plain, "write_piece", spied)
    return seen


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_is_allocated_is_overwritten_in_place(tmp_path, kind, placed, ways_around, rng):
    data = rng.randbytes(LONG)
    with made(tmp_path, kind) as node, running(node, tmp_path) as here:
        node.write(0, bytes([1]) * SIZE)
        here.client().write(70_000, data)
        assert placed and all(placed)
        assert node.read(70_000, LONG) == data


def test_nothing_is_put_in_place_where_ways_around_are_closed(tmp_path, placed, monkeypatch):
    monkeypatch.setattr(around, "is_open", False)
    with made(tmp_path) as node, running(node, tmp_path) as here:
        here.client().write(0, b"x" * LONG)
        assert placed and not any(placed)
        assert node.read(0, LONG) == b"x" * LONG


def test_the_server_asks_once_where_a_small_request_lies(tmp_path, monkeypatch, ways_around):
    """Of a cluster that has no place too, and then the node asks itself."""
    with made(tmp_path, "qcow2") as node, running(node, tmp_path) as here:
        node.write(0, b"x")
        asked: list[int] = []
        locate = type(node).locate

        def counted(self: Node, offset: int, length: int, *, write: bool = False) -> int:
            if self is node:
                asked.append(offset)
            return locate(self, offset, length, write=write)

        monkeypatch.setattr(type(node), "locate", counted)
        client = here.client()
        for offset, times in ((512, 1), (1 << 20, 2)):
            assert client.read(offset, 512) == bytes(512)
            assert asked == [offset] * times
            asked.clear()
            client.write(offset, b"y" * 512)
            assert asked == [offset] * times
            asked.clear()


def test_what_a_snapshot_has_is_not_overwritten(tmp_path, rng: random.Random):
    before, after = rng.randbytes(SIZE), rng.randbytes(LONG)
    with made(tmp_path, "qcow2") as node:
        node.write(0, before)
        path = node.filename
    diskwright.snapshot(path, create="first")
    with diskwright.open(path, read_only=False) as node, running(node, tmp_path) as here:
        assert node.read(0, SIZE) == before  # its tables are in memory now
        here.client().write(70_000, after)
        assert node.read(70_000, LONG) == after
    diskwright.snapshot(path, apply="first")
    with diskwright.open(path) as node:
        assert node.read(0, SIZE) == before


def test_a_long_write_can_be_durable_at_once(tmp_path):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        client = here.client()
        client.write(0, b"x" * LONG)
        assert node.has_unflushed
        client.write(0, b"y" * LONG, Flag.FUA)
        assert not node.has_unflushed


def test_a_long_write_into_a_last_sector_that_is_not_whole(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"o" * (LONG + 100))
    stop = -(-(LONG + 100) // 512) * 512
    with diskwright.open(str(path), format="raw", read_only=False) as node:
        with running(node, tmp_path) as here:
            here.client().write(0, b"n" * stop)
        assert node.size == stop
        assert node.read(0, stop) == b"n" * stop


def test_a_request_to_cache_writes_nothing_that_is_served_for_reading_only(tmp_path):
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    over = tmp_path / "over"
    backing = {"backing": tmp_path / "base", "backing_format": "raw"}
    diskwright.create(over, SIZE, format="qcow2", **backing)
    with diskwright.open(over, read_only=False) as node:
        for read_only, depth in ((True, 1), (False, 0)):
            with running(node, tmp_path, read_only=read_only) as here:
                assert here.client().do(Command.CACHE, 0, 1 << 20) == 0
            assert next(iter(node.extents(0, SIZE))).depth == depth
