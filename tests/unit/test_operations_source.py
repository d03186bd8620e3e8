"""Runs of a source: windows, neighbours, zeroes."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise

import diskwright
from diskwright.block import around
from diskwright.block.extent import DATA, ZERO
from diskwright.operations.source import (
    SKIP,
    Piece,
    Source,
    may_hold,
    side_by_side,
    windows,
)
from diskwright.operations.zeroes import is_zero, zero_runs


def random_pieces(rng: random.Random) -> list[Piece]:
    pieces, offset = [], 0
    for _ in range(rng.randrange(1, 40)):
        length = rng.choice((512, 4096, 3 * 512, 65536, 1 << 20))
        pieces.append(Piece(offset, length, rng.choice((DATA, ZERO, SKIP))))
        offset += length
    return pieces


def test_windows_cover_everything_once_and_are_short_where_there_is_data(rng):
    for _ in range(200):
        pieces = random_pieces(rng)
        unit = rng.choice((4096, 65536))
        position = 0
        for window in windows(pieces, lambda unit=unit: unit):
            assert window.offset == position
            assert sum(piece.length for piece in window.pieces) == window.length
            at = window.offset
            for piece in window.pieces:
                assert piece.offset == at
                at += piece.length
            if len(window.pieces) > 1 or window.pieces[0].kind == DATA:
                assert window.offset // unit == (window.offset + window.length - 1) // unit
            position += window.length
        assert position == pieces[-1].offset + pieces[-1].length


def test_windows_keep_every_byte_of_its_kind(rng):
    for _ in range(50):
        pieces = random_pieces(rng)
        wanted = [kind for piece in pieces for kind in [piece.kind] * (piece.length // 512)]
        found = [
            kind
            for window in windows(pieces, lambda: 65536)
            for piece in window.pieces
            for kind in [piece.kind] * (piece.length // 512)
        ]
        assert found == wanted


def test_neighbours_of_two():
    first = iter([(10, "a"), (30, "b")])
    second = iter([(5, 1), (10, 2), (30, 3)])
    assert list(side_by_side(first, second)) == [
        (0, 5, "a", 1),
        (5, 10, "a", 2),
        (10, 30, "b", 3),
    ]


def test_zero_runs_say_what_a_plain_look_says(rng):
    for _ in range(100):
        unit = rng.choice((512, 4096))
        length = rng.choice((unit, 10 * unit, 10 * unit + 512, 777))
        buffer = bytearray(length)
        for _ in range(rng.randrange(4)):
            buffer[rng.randrange(length)] = rng.randrange(1, 256)
        head = rng.choice((0, unit // 2)) if length > unit else 0
        view = memoryview(buffer)
        position = 0
        for start, stop, empty in zero_runs(view, unit, head):
            assert start == position < stop
            assert (not any(buffer[start:stop])) == empty or not empty
            if not empty:
                units = [start, *range(start + (head - start) % unit, stop, unit), stop]
                parts = [buffer[a:b] for a, b in pairwise(units) if b > a]
                assert all(any(part) for part in parts)
            position = stop
        assert position == length


def test_is_zero():
    assert is_zero(memoryview(bytes(200_000)))
    for at in (0, 65535, 65536, 199_999):
        buffer = bytearray(200_000)
        buffer[at] = 1
        assert not is_zero(memoryview(buffer))


def test_a_source_of_several_reads_over_their_ends(tmp_path):
    (tmp_path / "one").write_bytes(b"1" * 1000)  # not whole sectors: 24 bytes of zeroes follow
    (tmp_path / "two").write_bytes(b"2" * 2048)
    with diskwright.open(tmp_path / "one", format="raw") as one:
        with diskwright.open(tmp_path / "two", format="raw") as two:
            source = Source([one, two])
            assert source.size == 1024 + 2048
            buffer = bytearray(source.size - 500)
            source.read_into(500, memoryview(buffer))
            assert buffer == b"1" * 500 + bytes(24) + b"2" * 2048
            assert sum(piece.length for piece in source.pieces()) == source.size


def test_holes_in_preallocated_data_are_found(tmp_path):
    name = tmp_path / "full.qcow2"
    diskwright.create(name, "8M", format="qcow2", options="preallocation=metadata")
    with diskwright.open(name, read_only=False) as node:
        node.write(5 << 20, b"x" * 65536)
    with diskwright.open(name) as node:
        kinds = {piece.kind for piece in Source([node]).pieces() if piece.offset < 4 << 20}
        assert kinds == {ZERO}
        held = [stop for stop, holds in may_hold(node, 8 << 20) if holds]
        assert held
        assert held[-1] < 6 << 20


def asked_through(monkeypatch, name, **how) -> int:
    """How often the node itself was asked for a piece of data, which must be right."""
    asked: list[int] = []

    def count(node, offset, view):
        asked.append(offset)
        return real(node, offset, view)

    with diskwright.open(name, **how) as node, monkeypatch.context() as patch:
        real = type(node)._read_into
        patch.setattr(type(node), "_read_into", count)
        source = Source([node])
        piece = next(piece for piece in source.pieces() if piece.kind == DATA)
        buffer = bytearray(piece.length)
        source.read_piece(piece, memoryview(buffer))
        assert buffer == b"x" * piece.length
    return len(asked)


def test_plain_data_are_read_from_where_they_lie_if_nobody_can_move_them(
    tmp_path, monkeypatch, ways_around
):
    name = tmp_path / "plain.qcow2"
    diskwright.create(name, "8M", format="qcow2")
    with diskwright.open(name, read_only=False) as node:
        node.write(1 << 20, b"x" * (1 << 18))
    assert asked_through(monkeypatch, name) == 0
    assert asked_through(monkeypatch, name, read_only=False) == 1
    (tmp_path / "raw").write_bytes(b"x" * (1 << 18))
    file = {"driver": "file", "filename": str(tmp_path / "raw")}
    limit = {"driver": "throttle", "limits.iops-total": 1000}
    slow = {**limit, "file": {"driver": "raw", "file": file}}
    assert asked_through(monkeypatch, "json:" + json.dumps(slow)) == 1
    monkeypatch.setattr(around, "is_open", False)
    assert asked_through(monkeypatch, name) == 1


def test_data_that_the_file_has_no_more_are_read_through_the_image(tmp_path, ways_around):
    name = tmp_path / "short.qcow2"
    diskwright.create(name, "8M", format="qcow2")
    with diskwright.open(name, read_only=False) as node:
        node.write(0, b"x" * (1 << 18))
    with diskwright.open(name) as node:
        source = Source([node])
        piece = next(iter(source.pieces()))
        os.truncate(name, piece.host_offset + 1000)
        buffer = bytearray(b"y" * piece.length)
        source.read_piece(piece, memoryview(buffer))
        assert buffer == b"x" * 1000 + bytes(piece.length - 1000)
