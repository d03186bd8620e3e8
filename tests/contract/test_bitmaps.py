"""Dirty bitmaps of an image: whatever changes the disk is noted, and nothing else is."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from diskwright.errors import UnsupportedError
from tests.contract.disk import Disk, boundaries, noise
from tests.contract.rows import Row, opened, rows

keeping = rows(lambda row: row.bitmaps)


@keeping
@pytest.mark.parametrize("what", ["write", "zero", "unmap", "discard"])
def test_requests_of_every_alignment_are_noted(row: Row, tmp_path: Path, what: str, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        for place in boundaries(node):
            length = min(rng.choice((1, 511, 512, 5000, 70_000)), node.size - place)
            for name in disk.noted.models:
                node.bitmap_clear(name)
            disk.noted = type(disk.noted)(node)
            if what == "write":
                disk.write(place, noise(rng, length))
            elif what == "discard":
                disk.discard(place, length)
            else:
                disk.zero(place, length, unmap=what == "unmap")
            disk.noted.verify(node)


@keeping
def test_what_changes_no_content_is_not_noted(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        node.read(0, node.size)
        node.populate(0, node.size)
        node.flush()
        node.write(1000, b"")
        node.reopen(read_only=True)
        node.reopen(read_only=False)
        node.check()
        disk.noted.verify(node)
        path = node.filename
    with row.open(path) as node:
        disk.noted.verify(node)


@keeping
def test_writers_side_by_side_lose_no_note(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        step = 4096

        def work(first: int) -> None:
            for offset in range(first * step, node.size - step, 8 * step):
                node.write(offset + first, b"x" * 100)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for first in range(4):
            for offset in range(first * step, node.size - step, 8 * step):
                disk.noted.touch(offset + first, 100)
        disk.noted.verify(node)
        path = node.filename
    with row.open(path) as node:
        disk.noted.verify(node)


@keeping
def test_a_crash_leaves_bitmaps_that_nobody_trusts(row: Row, tmp_path: Path):
    """One that noted when the power failed may lack notes; it says so from then on."""
    with opened(row, tmp_path) as node:
        node.bitmap_add("idle", enabled=False)
        node.write(0, b"x")
        node.flush()
        after = tmp_path / "after"
        after.mkdir()
        for name in row.files(node.filename):
            shutil.copy(name, after / Path(name).name)
        image = str(after / Path(node.filename).name)
    with row.open(image) as node:
        for info in node.dirty_bitmaps():
            assert info.inconsistent == (info.name != "idle")
            if info.inconsistent:
                with pytest.raises(UnsupportedError):
                    node.dirty_bitmap(info.name)
                with pytest.raises(UnsupportedError):
                    node.bitmap_clear(info.name)
                node.bitmap_remove(info.name)
        assert [info.name for info in node.dirty_bitmaps()] == ["idle"]
        assert node.check().clean


@keeping
def test_a_snapshot_is_not_gone_back_to_behind_their_back(row: Row, tmp_path: Path):
    """What they noted would be wrong then."""
    with opened(row, tmp_path) as node:
        node.write(0, b"before")
        with pytest.raises(UnsupportedError):
            node.snapshot_apply("any")
        assert node.read(0, 6) == b"before"
