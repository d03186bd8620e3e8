"""A backing file: what shows through, copying on write, bringing up, shorter and longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diskwright.block import requests
from diskwright.block.extent import DATA, ZERO
from diskwright.block.graph import Graph
from diskwright.block.node import Node
from diskwright.errors import DiskwrightError
from tests.contract.disk import Disk, boundaries, check_clean, noise
from tests.contract.rows import Row, rows

OVERLAYS = rows(lambda row: row.backing)
#: Formats whose overlays may have another size than their base.
SIZED = rows(lambda row: row.backing and row.driver in ("qcow2", "odd"))


@contextmanager
def over(row: Row, folder: Path, below: bytes, size: int | None = None) -> Iterator[Disk]:
    """An image over a base that holds `below`."""
    base, path = str(folder / "base"), str(folder / "overlay")
    row.create_base(base, len(below))
    with row.open_base_at(base) as node:
        node.write(0, below)
        length = node.size
    size = length if size is None else size
    row.create_over(path, base, size)
    with row.open_over(path, base) as node:
        shown = below.ljust(length, b"\0")
        yield Disk(node, shown[: node.size].ljust(node.size, b"\0"))


@pytest.fixture
def below(row: Row, rng) -> bytes:
    data = bytearray(noise(rng, row.size))
    data[100_000:400_000] = bytes(300_000)
    return bytes(data)


@OVERLAYS
def test_the_base_shows_through(row: Row, tmp_path: Path, below: bytes):
    with over(row, tmp_path, below) as disk:
        disk.verify()
        for extent in disk.node.extents(0, disk.node.size, depth=0):
            assert not extent.allocated


@OVERLAYS
def test_a_long_populate_lets_others_in(row: Row, tmp_path: Path, below: bytes, monkeypatch):
    """It is several requests, between which somebody can have the node alone."""
    monkeypatch.setattr(requests, "_NEAR", 1 << 20)
    begun: list[None] = []
    with over(row, tmp_path, below) as disk:
        request = type(disk.node.graph).request

        def counted(graph: Graph) -> object:
            begun.append(None)
            return request(graph)

        with monkeypatch.context() as patch:
            patch.setattr(type(disk.node.graph), "request", counted)
            disk.node.populate(0, disk.node.size)
        assert len(begun) == -(-disk.node.size // (1 << 20))
        whole = disk.node.extents(0, disk.node.size)
        assert all(extent.depth == 0 for extent in whole if extent.kind == DATA)
        disk.verify()
        check_clean(disk.node)
        with pytest.raises(DiskwrightError):
            disk.node.populate(0, disk.node.size + 1)


@OVERLAYS
def test_edges_are_copied(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        places = boundaries(disk.node)
        for start in places:
            stop = min(start + rng.choice((1, 511, 512, 5000)), disk.node.size)
            disk.write(start, noise(rng, stop - start))
            disk.verify(start - 70_000, stop + 70_000)
        disk.verify()
        check_clean(disk.node)
    assert (tmp_path / "base").stat().st_size > 0


@OVERLAYS
def test_the_base_is_not_written_to(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        before = (tmp_path / "base").read_bytes()
        disk.write(0, noise(rng, 200_000))
        disk.zero(300_000, 100_000)
        disk.node.flush()
    assert (tmp_path / "base").read_bytes() == before


@OVERLAYS
def test_zeroes_hide_the_base(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        for unmap in (False, True):
            for start in boundaries(disk.node):
                stop = min(start + rng.choice((1, 511, 4096, 150_000)), disk.node.size)
                disk.zero(start, stop - start, unmap=unmap)
                disk.verify(start - 70_000, stop + 70_000)
        disk.verify()
        check_clean(disk.node)


@OVERLAYS
def test_populating_changes_nothing_but_where_it_lies(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        node = disk.node
        disk.write(5000, noise(rng, 5000))
        disk.zero(1 << 20, 70_000)
        for offset, length in ((0, 1), (4000, 100_000), (0, node.size)):
            node.populate(offset, length)
            disk.verify()
            if offset == 0:
                found = next(iter(node.extents(0, 1)))
                assert (found.depth, found.kind) == (0, DATA)
        assert node.backing is not None
        for extent in node.extents(0, node.size):
            assert extent.depth == 0 or extent.kind == ZERO
        check_clean(node)


@OVERLAYS
def test_depth_counts_the_layers(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        unit = max(disk.node.limits.cluster_size, 65536)
        disk.write(unit, noise(rng, unit))
        depths = {}
        for extent in disk.node.extents(0, 3 * unit):
            if extent.kind == DATA:
                depths[extent.offset // unit] = extent.depth
        assert depths[0] == 1
        assert depths[1] == 0


@SIZED
@pytest.mark.parametrize("shorter", [512, 70_000, 1 << 20], ids=str)
def test_a_shorter_base(row: Row, tmp_path: Path, shorter: int, rng):
    """What it does not have is zero, also in the middle of a cluster."""
    below = noise(rng, row.size - shorter)
    with over(row, tmp_path, below, row.size) as disk:
        disk.verify()
        end = len(below)
        found = [e for e in disk.node.extents(end, disk.node.size - end) if e.kind == DATA]
        assert not found
        disk.node.populate(end - 1000, 1500)
        disk.verify()
        disk.write(end - 10, noise(rng, 20))
        disk.verify()
        disk.zero(end - 3, 6)
        disk.verify()
        disk.node.populate(0, disk.node.size)
        disk.verify()
        check_clean(disk.node)


@rows(lambda row: row.backing and row.resizes)
@pytest.mark.parametrize("size", [512, 65536, 65536 + 512, 1 << 20], ids=str)
def test_growing_over_a_longer_base(row: Row, tmp_path: Path, size: int, rng):
    """What is added is zero, though the base has something there."""
    below = noise(rng, row.size)
    with over(row, tmp_path, below, size) as disk:
        disk.verify()
        disk.resize(size + 512)
        disk.verify()
        disk.resize(row.size // 2)
        disk.verify()
        disk.resize(row.size + 65536)
        disk.verify()
        check_clean(disk.node)
        disk.write(size - 100, noise(rng, 200))
        disk.verify()
        disk.resize(max(size // 2 // 512 * 512, row.shortest))
        disk.resize(row.size)
        disk.verify()
        check_clean(disk.node)


@rows(lambda row: row.backing and row.driver != "odd")
def test_emptying(row: Row, tmp_path: Path, below: bytes, rng):
    with over(row, tmp_path, below) as disk:
        shown = bytes(disk.model)
        disk.write(0, noise(rng, 300_000))
        disk.zero(1 << 20, 100_000)
        node: Node = disk.node
        node.make_empty()
        disk.model[:] = shown
        disk.verify()
        check_clean(node)
        disk.write(5, b"and again")
        disk.verify()
        check_clean(node)
