"""Growing and shrinking: what is added reads as zero, what is cut off never comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.errors import DiskwrightError, RangeError, UnsupportedError
from tests.contract.disk import Disk, check_clean, noise
from tests.contract.rows import Row, opened, rows


@rows(lambda row: row.resizes)
def test_growing_and_shrinking(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        step = max(node.limits.cluster_size, 4096)
        larger = node.size + step
        for size in (larger, larger + 512, 5 * step + 512, 512, 9 * step, row.shortest):
            disk.resize(size)
            disk.verify()
            check_clean(node)
            if size:
                offset = rng.randrange(size)
                disk.write(offset, noise(rng, min(5000, size - offset)))
                disk.write(size - 1, b"\xcc")
        disk.resize(3 * step)
        disk.verify()
        path = node.filename
    with row.open(path) as node:
        Disk(node, disk.model).verify()
        check_clean(node)


@rows(lambda row: row.resizes)
def test_what_was_cut_off_is_zero_when_it_is_back(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        size = node.size
        for cut in (512, 4096 - 512, 65536, 65536 + 512):
            disk.write(0, noise(rng, size))
            disk.resize(size - cut)
            disk.resize(size)
            disk.verify()
            assert not any(node.read(size - cut, cut))
        check_clean(node)


@rows(lambda row: row.resizes)
def test_a_far_larger_image(row: Row, tmp_path: Path, rng):
    """Top tables grow; the old content stays."""
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(100_000, noise(rng, 100_000))
        head = bytes(disk.model)
        cluster = max(node.limits.cluster_size, 512)
        size = 64 << 20 if cluster <= 4096 else 20 << 30
        node.truncate(size)
        assert node.size == size
        assert node.read(0, len(head)) == head
        node.write(size - 3000, b"\xdd" * 3000)
        assert node.read(size - 4096, 4096) == bytes(1096) + b"\xdd" * 3000
        check_clean(node)
        path = node.filename
    with row.open(path) as node:
        assert node.size == size
        assert node.read(size - 4096, 4096) == bytes(1096) + b"\xdd" * 3000
        assert node.read(0, len(head)) == head


@rows(lambda row: row.resizes)
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_preallocation_of_what_is_added(row: Row, tmp_path: Path, mode: str, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        wanted = node.size + 2 * max(node.limits.cluster_size, 65536)
        try:
            node.truncate(wanted, preallocation=mode)
        except UnsupportedError:
            assert mode == "metadata" or row.driver not in ("raw", "qcow2")
            assert node.size == len(disk.model)
        else:
            disk.model.extend(bytes(wanted - len(disk.model)))
            disk.verify()
            disk.write(wanted - 70_000, noise(rng, 60_000))
        disk.verify()
        check_clean(node)
        with pytest.raises(DiskwrightError):
            node.truncate(512, preallocation=mode)


@rows(lambda row: row.resizes)
def test_sizes_that_are_refused(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        node.write(0, b"here")
        size = node.size
        with pytest.raises(RangeError):
            node.truncate(-512)
        with pytest.raises(DiskwrightError):
            node.truncate(1 << 63)
        with pytest.raises(DiskwrightError):
            node.truncate(size + 65536, preallocation="some")
        assert node.size == size
        assert node.read(0, 4) == b"here"
        check_clean(node)
        path = node.filename
    with row.open(path) as node:
        assert node.size == size


@rows(lambda row: not row.resizes)
def test_a_format_that_cannot(row: Row, tmp_path: Path):
    path = str(tmp_path / "image")
    row.create(path)
    before = [Path(name).read_bytes() for name in row.files(path)]
    with row.open(path) as node:
        assert not node.can_resize
        size = node.size
        with pytest.raises(UnsupportedError) as caught:
            node.truncate(size * 2)
        assert caught.value.qemu_message == "Image format driver does not support resize"
        assert node.size == size
    assert [Path(name).read_bytes() for name in row.files(path)] == before
