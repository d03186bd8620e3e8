"""Longer and shorter qcow2 images, their space, and refcounts that lag behind."""

from __future__ import annotations

import os

import pytest

from diskwright.block.info import SnapshotInfo
from diskwright.drivers.formats.qcow2.tables import Qcow2Tables
from diskwright.errors import DiskwrightError
from tests.unit.qcow2_images import MIB, Fields, Qemu, create, memory_folder, opened
from tests.unit.test_qcow2_contents import work

tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"compat": "0.10"}, {"cluster_size": 512}, {"cluster_size": "2M"}, {"refcount_bits": 1}],
    ids=str,
)
def test_random_sizes(qemu, tmp_path, rng, options):
    path, content = tmp_path / "sizes.qcow2", bytearray(MIB)
    create(path, MIB, **options)
    for _ in range(2 if options.get("cluster_size") == "2M" else 5):
        with opened(path) as node:
            work(node, content, rng, 10)
            size = rng.randrange(1, 6 * MIB // 512) * 512
            node.truncate(size, preallocation="off")
            content = content[:size].ljust(size, b"\0")
            assert node.read(0, size) == content
            assert node.check().clean
        qemu.clean(path)
        qemu.same(path, content)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_growing_with_preallocation(qemu, tmp_path, rng, mode):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for path in (ours, theirs):
        create(path, MIB + 512)
        qemu.io(path, "w -q -P 5 900k 124k")
    with opened(ours) as node:
        node.truncate(4 * MIB, preallocation=mode)
        content = node.read(0, 4 * MIB)
    assert content == bytes(900 * 1024) + b"\5" * (124 * 1024) + bytes(3 * MIB)
    qemu.img("resize", "-q", "--preallocation", mode, theirs, "4M")
    assert _places(qemu, ours) == _places(qemu, theirs)
    qemu.clean(ours)
    qemu.same(ours, content)


def _places(qemu, path):
    """Where each cluster lies in the file; what of it is a hole is the file system's matter."""
    found = {}
    for run in qemu.json("map", "--output=json", path):
        if run["present"]:
            for at in range(0, run["length"], 512):
                found[run["start"] + at] = run.get("offset", 0) + at
    return found


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}], ids=str)
def test_growing_over_a_longer_backing_file_shows_zeroes(qemu, tmp_path, options):
    base, path = tmp_path / "base.raw", tmp_path / "over.qcow2"
    base.write_bytes(b"b" * (3 * MIB))
    create(path, MIB + 512, **options, backing_file="base.raw", backing_fmt="raw")
    with opened(path) as node:
        node.truncate(4 * MIB)
        content = node.read(0, 4 * MIB)
    assert content == b"b" * (MIB + 512) + bytes(3 * MIB - 512)
    qemu.clean(path)
    qemu.same(path, content)


@pytest.mark.parametrize("mode", ["metadata", "full"])
def test_growing_over_a_backing_file_with_preallocation(qemu, tmp_path, mode):
    base, path = tmp_path / "base.raw", tmp_path / "over.qcow2"
    base.write_bytes(b"b" * (128 << 10))
    create(path, 31 << 10, backing_file="base.raw", backing_fmt="raw")
    with opened(path) as node:
        node.truncate(96 << 10, preallocation=mode)
        content = node.read(0, node.size)
    assert content == b"b" * (31 << 10) + bytes(65 << 10)
    qemu.clean(path)
    qemu.same(path, content)
    # Header, refcount table and block, L1 and L2 table, two clusters of data.
    assert path.stat().st_size == 7 * 65536


def test_a_shrunk_image_gives_its_space_back(qemu, tmp_path):
    path = tmp_path / "shrunk.qcow2"
    create(path, 8 * MIB)
    with opened(path) as node:
        node.write(0, os.urandom(8 * MIB))
        node.truncate(MIB)
    assert path.stat().st_size < 2 * MIB
    qemu.clean(path)
    with opened(path) as node:
        node.truncate(2 * MIB)
        assert not any(node.read(MIB, MIB))


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_what_an_interrupted_shrink_left_does_not_come_back(qemu, tmp_path, cluster_size):
    path, data = tmp_path / "interrupted.qcow2", os.urandom(4 * MIB)
    create(path, 4 * MIB, cluster_size=cluster_size)
    with opened(path) as node:
        node.write(0, data)
    Fields(path).put(24, MIB + 512)  # the size: what is done first
    with opened(path) as node:
        node.truncate(4 * MIB)
        assert node.read(0, 4 * MIB) == data[: MIB + 512].ljust(4 * MIB, b"\0")
    qemu.clean(path)
    qemu.same(path, data[: MIB + 512].ljust(4 * MIB, b"\0"))


def test_resizing_to_the_same_size_frees_what_an_interrupted_shrink_left(qemu, tmp_path):
    path = tmp_path / "again.qcow2"
    create(path, 4 * MIB)
    with opened(path) as node:
        node.write(0, os.urandom(4 * MIB))
    Fields(path).put(24, MIB)
    with opened(path) as node:
        node.truncate(MIB)
        assert node.refcounts.count_used() < 2 * MIB >> 16
    qemu.clean(path)


def test_a_shrink_moves_no_table(qemu, tmp_path):
    """Else a file that is one piece becomes several (see QEMU's iotest 250)."""
    path = tmp_path / "steady.qcow2"
    create(path, 64 * MIB, cluster_size=4096)
    with opened(path) as node:
        node.write(0, os.urandom(8 * MIB))
        header = node.header
        before = (header.l1_table_offset, header.refcount_table_offset, node.l1[0])
        node.truncate(MIB + 512)
        assert before == (header.l1_table_offset, header.refcount_table_offset, node.l1[0])
        assert not any(node.l1[1:])
    qemu.clean(path)


def test_a_shrunk_image_keeps_what_its_snapshot_has(qemu, tmp_path):
    path, data = tmp_path / "kept.qcow2", os.urandom(4 * MIB)
    create(path, 4 * MIB, cluster_size=4096)
    with opened(path) as node:
        node.write(0, data)
        node.snapshot_create(SnapshotInfo("", "whole"))
        node.truncate(MIB + 1536)
        assert node.read(0, node.size) == data[: MIB + 1536]
        node.truncate(4 * MIB)
        assert node.read(0, node.size) == data[: MIB + 1536].ljust(4 * MIB, b"\0")
        node.snapshot_apply("whole")
        assert node.read(0, node.size) == data
    qemu.clean(path)


def test_impossible_sizes_are_refused_in_qemus_words(qemu, tmp_path):
    path = tmp_path / "refused.qcow2"
    create(path, MIB, cluster_size=512)
    old = tmp_path / "old.qcow2"
    create(old, MIB, compat="0.10")
    qemu.img("snapshot", "-c", "a", old)
    for image, size, flags in (
        (path, MIB + 100, []),
        (path, 200 << 30, []),
        (path, 1000, ["--shrink"]),
        (old, 2 * MIB, []),
    ):
        said = qemu.img("resize", "-q", *flags, "-f", "qcow2", image, size, fails=True)
        assert said.code == 1
        with opened(image) as node, pytest.raises(DiskwrightError) as caught:
            node.truncate(size)
        assert said.err.endswith(f"qemu-img: {caught.value.qemu_message}\n")


# ------------------------------------------------------------------------------ lazy refcounts


def test_a_lazy_image_is_dirty_while_it_is_written_and_counted_anew_after_a_crash(qemu, tmp_path):
    path, lost = tmp_path / "lazy.qcow2", tmp_path / "lost.qcow2"
    create(path, 4 * MIB, lazy_refcounts="on")
    with opened(path) as node:
        assert Fields(path).get(72) == 0
        node.write(0, b"x" * MIB)
        node.flush()
        lost.write_bytes(path.read_bytes())
        assert Fields(path).get(72) == 1
    assert Fields(path).get(72) == 0
    qemu.clean(path)
    assert qemu.img("check", "-f", "qcow2", lost, fails=True).code == 2
    with opened(lost, read_only=True) as node:
        assert node.info().dirty
        assert node.read(0, MIB) == b"x" * MIB
    with opened(lost) as node:
        assert not node.info().dirty
        assert node.check().clean
        assert node.read(0, MIB) == b"x" * MIB
    qemu.clean(lost)
    assert Fields(lost).get(72) == 0


def test_what_qemu_left_dirty_is_counted_anew(real, qemu, tmp_path):
    path = tmp_path / "killed.qcow2"
    create(path, 4 * MIB, lazy_refcounts="on")
    said = qemu.io(path, "w -q -P 6 0 1M", "flush", "abort", fails=True)
    assert said.code != 0
    assert Fields(path).get(72) == 1
    with opened(path) as node:
        assert node.read(0, MIB) == b"\6" * MIB
        assert node.check().clean
    qemu.clean(path)


def test_the_option_overrides_the_image(qemu, tmp_path):
    path = tmp_path / "chosen.qcow2"
    create(path, MIB)
    with opened(path, **{"lazy-refcounts": "on"}) as node:
        node.write(0, b"x")
        assert Fields(path).get(72) == 1
    qemu.clean(path)
    create(path, MIB, compat="0.10")
    with pytest.raises(DiskwrightError, match="Lazy refcounts require a qcow2 image"):
        opened(path, **{"lazy-refcounts": "on"})


def test_growing_looks_at_each_missing_table_a_few_times(tmp_path, monkeypatch):
    looked = []
    ask = Qcow2Tables._empty_until

    def empty_until(self, cluster: int, length: int) -> int:
        looked.append((length >> self.l1_shift) + 1)
        return ask(self, cluster, length)

    path = tmp_path / "small.qcow2"
    create(path, MIB, cluster_size=512)
    with opened(path) as node:
        monkeypatch.setattr(Qcow2Tables, "_empty_until", empty_until)
        node.truncate(9 * MIB, preallocation="metadata")
        assert sum(looked) < 8 * (9 * MIB >> node.l1_shift)
