"""Internal snapshots: each keeps what was there, whatever happens afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.block.info import SnapshotInfo
from diskwright.errors import DiskwrightError
from tests.contract.disk import Disk, check_clean, noise
from tests.contract.rows import Row, opened, rows

KEEPING = rows(lambda row: row.snapshots)


def _keep(disk: Disk, name: str) -> bytes:
    made = disk.node.snapshot_create(SnapshotInfo("", name))
    assert made.id
    assert made.name == name
    return bytes(disk.model)


def _change(disk: Disk, rng) -> None:
    size = disk.node.size
    for _ in range(4):
        offset = rng.randrange(size)
        length = min(rng.randrange(1, 150_000), size - offset)
        what = rng.randrange(4)
        if what < 2:
            disk.write(offset, noise(rng, length))
        elif what == 2:
            disk.zero(offset, length, unmap=rng.random() < 0.5)
        else:
            disk.discard(offset, length)


@KEEPING
def test_snapshots_keep_what_was_there(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        kept: dict[str, bytes] = {}
        for number in range(3):
            _change(disk, rng)
            kept[f"s{number}"] = _keep(disk, f"s{number}")
            disk.verify()
        _change(disk, rng)
        check_clean(node)
        assert [info.name for info in node.snapshots()] == list(kept)
        path = node.filename
        for name in ("s1", "s0", "s2"):
            node.snapshot_apply(name)
            disk.model[:] = kept[name]
            disk.verify()
            check_clean(node)
            _change(disk, rng)
            disk.verify()
        node.snapshot_delete("s1")
        check_clean(node)
        disk.verify()
    for name in ("s0", "s2"):
        with row.open(path, read_only=True, options={"snapshot": name}) as old:
            assert old.read(0, old.size) == kept[name]
            with pytest.raises(DiskwrightError):
                old.write(0, b"x")
    with row.open(path) as node:
        Disk(node, disk.model).verify()
        for info in list(node.snapshots()):
            node.snapshot_delete(info.id)
        assert node.snapshots() == []
        Disk(node, disk.model).verify()
        check_clean(node)


@KEEPING
def test_deleting_gives_the_space_back(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        sizes = []
        for _ in range(4):
            disk.write(0, noise(rng, 400_000))
            _keep(disk, "same")
            disk.write(0, noise(rng, 400_000))
            node.snapshot_delete("same")
            node.flush()
            sizes.append(Path(node.filename).stat().st_size)
        assert sizes[-1] < sizes[0] + 500_000, sizes
        disk.verify()
        check_clean(node)


@KEEPING
def test_what_is_not_there_is_refused(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, 5000))
        _keep(disk, "here")
        for action in (node.snapshot_apply, node.snapshot_delete):
            with pytest.raises(DiskwrightError, match="nowhere"):
                action("nowhere")
        disk.verify()
        assert [info.name for info in node.snapshots()] == ["here"]
        check_clean(node)


@rows(lambda row: not row.snapshots and row.driver != "qcow2")
def test_a_format_without(row: Row, tmp_path: Path):
    path = str(tmp_path / "image")
    row.create(path)
    with row.open(path) as node:
        assert not node.can_snapshot
        assert node.snapshots() == []
        with pytest.raises(DiskwrightError) as caught:
            node.snapshot_create(SnapshotInfo("", "x"))
        assert caught.value.kind == "unsupported"
