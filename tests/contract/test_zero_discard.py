"""Zeroing and discarding: what reads as zero, what must not change, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.block.extent import DATA, ZERO
from diskwright.errors import UnsupportedError
from tests.contract.disk import Disk, boundaries, check_clean, noise
from tests.contract.rows import Row, opened, rows


@rows()
@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
def test_zeroes_of_every_alignment(row: Row, tmp_path: Path, unmap: bool, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        places = boundaries(node)
        for start in places:
            for stop in rng.sample(places, 3):
                if start < stop and stop - start < node.size * 3 // 4:
                    disk.zero(start, stop - start, unmap=unmap)
                    disk.verify(start - 600, stop + 600)
                    if rng.random() < 0.3:
                        disk.write(start, noise(rng, stop - start))
        disk.verify()
        check_clean(node)
        path = node.filename
    with row.open(path, read_only=True) as node:
        Disk(node, disk.model).verify()


@rows()
def test_zeroes_over_nothing(row: Row, tmp_path: Path, rng):
    """Zeroing what was never written, edges included, and writing into it afterwards."""
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        cluster = max(node.limits.cluster_size, 512)
        disk.zero(5, min(3 * cluster, node.size - 10))
        disk.verify()
        for _ in range(5):
            offset = rng.randrange(node.size - 600)
            disk.write(offset, noise(rng, 600))
            disk.zero(offset + 10, 100)
        disk.verify()
        check_clean(node)


@rows()
def test_zeroes_take_no_room(row: Row, tmp_path: Path):
    """Where nothing is, zeroing makes no data of it."""
    with opened(row, tmp_path) as node:
        if not node.can_zero:
            pytest.skip(f"{row.driver} cannot zero but by writing")
        node.write_zeroes(0, node.size, unmap=True)
        if node.limits.request_alignment > 1 and row.driver == "odd":
            return
        kinds = {extent.kind for extent in node.extents(0, node.size)}
        assert DATA not in kinds or row.name in ("vdi-static", "vpc-fixed", "qcow2-metadata")


@rows()
@pytest.mark.parametrize("edges", [(0, 0), (100, 0), (0, 100), (700, 900)], ids=str)
def test_fast_is_all_or_a_refusal(row: Row, tmp_path: Path, edges: tuple[int, int], rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        cluster = max(node.limits.cluster_size, 4096)
        stop = min(3 * cluster, node.size)
        disk.write(0, noise(rng, stop))
        start, length = edges[0], stop - edges[0] - edges[1]
        try:
            node.write_zeroes(start, length, fast=True)
        except UnsupportedError:
            after = node.read(0, stop)
            for at in range(stop):
                assert after[at] in (disk.model[at], 0)
            assert after[:start] == disk.model[:start]
            assert after[start + length :] == disk.model[start + length : stop]
        else:
            disk.model[start : start + length] = bytes(length)
            disk.verify()
        check_clean(node)


@rows()
def test_discards_round_inwards(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        places = boundaries(node)
        for start in places:
            for stop in rng.sample(places, 3):
                if start < stop and stop - start < node.size * 3 // 4:
                    disk.discard(start, stop - start)
                    disk.verify(start - 600, stop + 600)
                    if rng.random() < 0.5:
                        disk.write(start, noise(rng, stop - start))
        disk.verify()
        check_clean(node)


@rows()
def test_all_is_discarded(row: Row, tmp_path: Path, rng):
    """The node's end counts as a boundary, and what was discarded can be written again."""
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        disk.discard(0, node.size)
        if node.can_discard and row.driver in ("raw", "qcow2", "odd") and not row.differs:
            assert node.limits.request_alignment > 512 or not any(node.read(node.size - 512, 512))
        check_clean(node)
        disk.write(node.size // 3, noise(rng, node.size // 3))
        disk.verify()
        check_clean(node)


@rows(lambda row: row.driver in ("qcow2", "odd") and row.cache == "writeback")
def test_discarded_space_is_used_again(row: Row, tmp_path: Path, rng):
    """A file does not grow for ever under writes and discards of the same amount."""
    with opened(row, tmp_path) as node:
        length = min(node.size // 2, 8 * max(node.limits.cluster_size, 4096))
        sizes = []
        for round_ in range(6):
            node.write(0, noise(rng, length))
            node.flush()
            node.discard(0, length)
            node.flush()
            sizes.append(sum(Path(name).stat().st_size for name in row.files(node.filename)))
            assert round_ >= 0
        assert sizes[-1] <= sizes[1] + length // 2, sizes
        check_clean(node)


@rows(lambda row: "discard" not in row.opens)
def test_the_option_discard_ignore(row: Row, tmp_path: Path, rng):
    path = str(tmp_path / "image")
    row.create(path)
    with row.open(path, can_unmap=False) as node:
        data = noise(rng, node.size)
        node.write(0, data)
        node.discard(0, node.size)
        assert node.read(0, node.size) == data
        node.write_zeroes(0, node.size, unmap=True)
        assert node.read(0, node.size) == bytes(node.size)


@rows(lambda row: row.opens.get("detect-zeroes") == "unmap")
def test_written_zeroes_are_detected(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, 1 << 20))
        disk.write(4096, bytes(1 << 19))
        disk.verify()
        found = [e for e in node.extents(0, 1 << 20) if e.kind == ZERO]
        assert sum(extent.length for extent in found) >= (1 << 19) - 8192
        disk.write(1000, bytes(100))
        disk.verify()
        check_clean(node)


@rows(lambda row: row.driver != "raw")
def test_a_refused_fast_zero_has_changed_nothing(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        start = 3 * node.size // 4 + 10
        for offset, stop in ((0, start), (start, node.size - 10), (10, 15)):
            try:
                node.write_zeroes(offset, stop - offset, fast=True)
            except UnsupportedError:
                disk.verify()
            else:
                disk.model[offset:stop] = bytes(stop - offset)
                disk.verify()
