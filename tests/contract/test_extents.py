"""Extents: no gaps, kinds that agree with what is read, places that hold what they say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

import diskwright
from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent
from diskwright.block.node import Node
from diskwright.drivers.formats.qcow2.driver import Qcow2
from tests.contract.disk import Disk, boundaries, noise
from tests.contract.rows import Row, opened, rows


def _messed(node: Node, rng: random.Random) -> Disk:
    """Data, zeroes, holes, and encoded units where there are such."""
    disk = Disk(node)
    cluster = max(node.limits.cluster_size, 4096)
    for _ in range(14):
        offset = rng.randrange(node.size)
        length = min(rng.randrange(1, 3 * min(cluster, 1 << 17)), node.size - offset)
        what = rng.randrange(5)
        if what < 3:
            disk.write(offset, noise(rng, length))
        elif what == 3:
            disk.zero(offset, length, unmap=rng.random() < 0.5)
        else:
            disk.discard(offset, length)
    encoder = node.encoder()
    if encoder is not None:
        for number in rng.sample(range(node.size // encoder.unit), 3):
            disk.write_unit(number, noise(rng, 100) * (encoder.unit // 100 + 1))
    return disk


def _assert_gapless(found: list[Extent], start: int, stop: int) -> None:
    position = start
    for extent in found:
        assert extent.offset == position
        assert extent.length > 0
        position = extent.end
    assert position == stop


def _assert_true(disk: Disk, extent: Extent) -> None:
    """What an extent says is so."""
    expected = bytes(disk.model[extent.offset : extent.end])
    if extent.kind == ZERO:
        assert not any(expected), f"not all zero: {extent}"
    if extent.kind == UNALLOCATED:
        assert not extent.allocated
        assert not any(expected), f"nothing shows through: {extent}"
    if extent.kind == DATA and extent.host_offset is not None and not extent.encoded:
        child = extent.child
        assert child is not None
        assert child.read(extent.host_offset, extent.length) == expected, extent
    assert (
        (extent.child is None) == (extent.host_offset is None)
        or extent.encoded
        or (not disk.node.children)
    )


@rows()
def test_extents_say_what_a_reader_gets(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = _messed(node, rng)
        depth = 0 if row.differs else None
        found = list(node.extents(0, node.size, depth=depth))
        _assert_gapless(found, 0, node.size)
        for extent in found:
            _assert_true(disk, extent)
        for before, after in itertools.pairwise(found):
            assert not before.continues(after), f"one run cut in two: {before} {after}"


@rows()
def test_extents_of_every_range(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = _messed(node, rng)
        places = boundaries(node)
        for start in rng.sample(places, min(10, len(places))):
            for stop in rng.sample(places, min(6, len(places))):
                if start < stop:
                    found = list(node.extents(start, stop - start))
                    _assert_gapless(found, start, stop)
                    for extent in found:
                        _assert_true(disk, extent)


@rows()
def test_resolve_ends_in_the_file(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = _messed(node, rng)
        node.flush()
        found = list(node.resolve(0, node.size))
        _assert_gapless(found, 0, node.size)
        for extent in found:
            if extent.child is None or extent.encoded:
                continue
            bottom = extent.child.node if extent.child.node.is_protocol else node
            assert bottom.is_protocol or node.limits.request_alignment > 1
            if extent.kind == DATA:
                with open(bottom.filename, "rb") as file:
                    file.seek(extent.host_offset)
                    expected = bytes(disk.model[extent.offset : extent.end])
                    assert file.read(extent.length).ljust(extent.length, b"\0") == expected
            elif extent.kind == ZERO:
                assert not any(disk.model[extent.offset : extent.end])


@rows(lambda row: row.cache == "writeback")
def test_resolve_goes_through_raw(row: Row, tmp_path: Path, rng):
    """A raw node between a format and its file adds its offset and nothing else."""
    path = str(tmp_path / "inner")
    row.create(path)
    shifted = str(tmp_path / "outer")
    Path(shifted).write_bytes(b"\xee" * 4096 + Path(path).read_bytes())
    below = {"driver": "raw", "offset": 4096, "file": {"driver": "file", "filename": shifted}}
    options: dict[str, object] = {"file": below}
    if row.driver == "odd":
        options["data-file"] = {"driver": "file", "filename": f"{path}.data"}
    if row.differs and row.driver != "qcow2":
        base = {"driver": "file", "filename": f"{path}.base"}
        options["backing"] = {"driver": row.base_driver, "file": base}
    with row.open(path, options=options) as node:
        disk = _messed(node, rng)
        disk.verify()
        node.flush()
        for extent in node.resolve(0, node.size):
            if extent.kind == DATA and extent.child is not None and not extent.encoded:
                name = extent.child.node.filename
                raw = Path(name).read_bytes()[extent.host_offset :][: extent.length]
                expected = bytes(disk.model[extent.offset : extent.end])
                assert raw.ljust(extent.length, b"\0") == expected


@rows(lambda row: row.driver != "raw")
def test_depth_ends_the_walk(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        node.write(0, b"x" * 512)
        for extent in node.extents(0, node.size, depth=0):
            assert extent.depth == 0
        first = next(node.extents(0, node.size))
        assert (first.kind, first.depth, first.allocated) == (DATA, 0, True)


def test_a_walk_may_be_left_and_the_node_used(tmp_path: Path):
    """The generator holds no gate between two steps: what is written meanwhile is no deadlock."""
    from tests.contract.rows import BY_NAME

    with opened(BY_NAME["odd"], tmp_path) as node:
        for at in range(0, node.size, 1 << 17):
            node.write(at, b"x")
        walk = node.extents(0, node.size)
        next(walk)
        node.write(5, b"y")
        node.flush()
        with node.graph.exclusive():
            pass
        assert sum(extent.length for extent in walk) > 0


def test_a_walk_over_nothing_takes_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty disk of 8 TiB is not asked a piece at a time, and one run is found in the midst."""
    path = tmp_path / "huge"
    diskwright.create(path, "8T", format="qcow2")
    asked: list[int] = []
    ask = Qcow2._extents

    def counted(node: Qcow2, offset: int, length: int) -> Iterable[Extent]:
        asked.append(offset)
        return ask(node, offset, length)

    monkeypatch.setattr(Qcow2, "_extents", counted)
    with diskwright.open(path, read_only=False) as node:
        node.write(5 << 40, b"x")
        runs = [(run.offset, run.length, run.kind) for run in node.extents(0, node.size)]
    after = (5 << 40) + (1 << 16)
    assert runs == [
        (0, 5 << 40, UNALLOCATED),
        (5 << 40, 1 << 16, DATA),
        (after, (8 << 40) - after, UNALLOCATED),
    ]
    assert len(asked) < 20


def test_a_walk_over_many_runs_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps that end at the most runs of one, wherever that is."""
    from tests.contract.rows import BY_NAME

    with opened(BY_NAME["odd"], tmp_path) as node:
        for at in range(0, node.size, 1 << 17):
            node.write(at, b"x")
        whole = list(node.extents(0, node.size))
        assert len(whole) > 8
        for most in (1, 2, 7):
            monkeypatch.setattr("diskwright.block.node.EXTENT_RUNS", most)
            assert list(node.extents(0, node.size)) == whole


@pytest.mark.parametrize("kind", [DATA, ZERO, UNALLOCATED])
def test_clipping(kind: int):
    extent = Extent(100, 50, kind, host_offset=1000)
    part = extent.clipped(110, 130)
    assert (part.offset, part.length, part.host_offset, part.kind) == (110, 20, 1010, kind)
    assert extent.clipped(0, 1000) == extent
    assert extent.clipped(200, 300).length <= 0
