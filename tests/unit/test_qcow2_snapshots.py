"""Internal snapshots: ours judged by QEMU, QEMU's used by us, a machine's state kept."""

from __future__ import annotations

import pytest

from diskwright.block.info import SnapshotInfo
from diskwright.errors import DiskwrightError, NotFoundError, UnsupportedError
from tests.unit.qcow2_images import MIB, Qemu, create, memory_folder, opened
from tests.unit.test_qcow2_contents import SIZE, work

tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


VARIANTS = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 4},
    {"refcount_bits": 64},
    {"lazy_refcounts": "on"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_life_with_snapshots(qemu, tmp_path, rng, options):
    path, content = tmp_path / "life.qcow2", bytearray(SIZE)
    create(path, SIZE, **options)
    kept: dict[str, bytes] = {}
    for step in range(9):
        by_qemu = rng.random() < 0.3
        with opened(path) as node:
            work(node, content, rng, 8)
        kind = rng.random()
        if kind < 0.5 or not kept:
            name = f"s{step}"
            kept[name] = bytes(content)
            _change(qemu, path, by_qemu, "-c", name)
        elif kind < 0.75:
            name = rng.choice(list(kept))
            content[:] = kept[name]
            _change(qemu, path, by_qemu, "-a", name)
        else:
            name = rng.choice(list(kept))
            del kept[name]
            _change(qemu, path, by_qemu, "-d", name)
        qemu.clean(path)
        with opened(path, read_only=True) as node:
            assert node.read(0, SIZE) == content
            assert [one.name for one in node.snapshots()] == list(kept)
            assert node.check().clean
    for name, wanted in kept.items():
        with opened(path, read_only=True, snapshot=name) as node:
            assert node.read(0, SIZE) == wanted
    qemu.same(path, content)


def _change(qemu, path, by_qemu, flag, name):
    if by_qemu:
        qemu.img("snapshot", flag, name, path)
        return
    with opened(path) as node:
        if flag == "-c":
            node.snapshot_create(SnapshotInfo("", name, date_seconds=1000))
        elif flag == "-a":
            node.snapshot_apply(name)
        else:
            node.snapshot_delete(name)


def test_the_list_is_qemus(qemu, tmp_path):
    path = tmp_path / "list.qcow2"
    create(path, MIB)
    with opened(path) as node:
        made = node.snapshot_create(
            SnapshotInfo("", "one", date_seconds=1700000000, date_nanoseconds=5, icount=7)
        )
        assert made.id == "1"
        node.snapshot_create(SnapshotInfo("7", "seven", vm_clock_nanoseconds=3_500_000_001))
        assert node.snapshot_create(SnapshotInfo("", "eight")).id == "8"
    qemu.img("snapshot", "-c", "nine", path)
    said = qemu.json("info", "--output=json", path)["snapshots"]
    with opened(path, read_only=True) as node:
        found = node.snapshots()
    for ours, theirs in zip(found, said, strict=True):
        assert (ours.id, ours.name) == (theirs["id"], theirs["name"])
        assert ours.date_seconds == theirs["date-sec"]
        assert ours.date_nanoseconds == theirs["date-nsec"]
        assert ours.vm_clock_nanoseconds == theirs["vm-clock-sec"] * 10**9 + theirs["vm-clock-nsec"]
        assert ours.vm_state_size == theirs["vm-state-size"]
        assert ours.icount == theirs.get("icount")


def test_ids_go_before_names(tmp_path):
    path = tmp_path / "names.qcow2"
    create(path, MIB)
    with opened(path) as node:
        for fill, name in ((b"a", "first"), (b"b", "1")):
            node.write(0, fill * 512)
            node.snapshot_create(SnapshotInfo("", name))
        node.snapshot_apply("1")
        assert node.read(0, 1) == b"a"
        for change in (node.snapshot_apply, node.snapshot_delete):
            with pytest.raises(NotFoundError, match="nothing"):
                change("nothing")
        assert node.read(0, 1) == b"a"


def test_a_snapshot_is_read_only(tmp_path):
    path = tmp_path / "past.qcow2"
    create(path, MIB)
    with opened(path) as node:
        node.snapshot_create(SnapshotInfo("", "past"))
    with pytest.raises(UnsupportedError, match="read-only"):
        opened(path, snapshot="past")


def test_a_refcount_that_is_full_refuses_and_changes_nothing(qemu, tmp_path):
    path = tmp_path / "narrow.qcow2"
    create(path, MIB, refcount_bits=1)
    with opened(path) as node:
        node.write(0, b"x" * 100000)
    before = path.read_bytes()
    with opened(path) as node:
        with pytest.raises(DiskwrightError) as caught:
            node.snapshot_create(SnapshotInfo("", "too many"))
        assert caught.value.qemu_message == "Invalid argument"
        assert node.read(0, 2) == b"xx"
    assert path.read_bytes() == before
    said = qemu.img("snapshot", "-c", "too many", path, fails=True)
    assert "Invalid argument" in said.err


def test_a_snapshot_brings_its_size_back(qemu, tmp_path):
    path = tmp_path / "sizes.qcow2"
    create(path, MIB)
    with opened(path) as node:
        node.write(0, b"x" * 512)
        node.snapshot_create(SnapshotInfo("", "small"))
        node.truncate(64 * MIB)
        node.write(63 * MIB, b"far")
        node.snapshot_create(SnapshotInfo("", "large"))
        node.snapshot_apply("small")
        assert node.size == MIB
        assert node.check().clean
        node.snapshot_apply("large")
        assert node.read(63 * MIB, 3) == b"far"
    qemu.clean(path)


def test_a_machines_state_survives_our_changes(real, qemu, tmp_path):
    path = tmp_path / "machine.qcow2"
    create(path, 8 * MIB + 512)
    with opened(path) as node:
        node.write(0, b"before")
    _monitor(real, tmp_path, path, "savevm state")
    with opened(path) as node:
        assert node.snapshots()[0].vm_state_size > 0
        node.write(0, b"after!")
        node.snapshot_create(SnapshotInfo("", "ours"))
        node.snapshot_apply("state")
        assert node.read(0, 6) == b"before"
        node.truncate(32 * MIB)  # what was the state must not become the disk's
        assert not any(node.read(8 * MIB + 512, 24 * MIB - 512))
        assert node.check().clean
    qemu.clean(path)
    assert "rror" not in _monitor(real, tmp_path, path, "loadvm state")
    with opened(path) as node:
        node.snapshot_delete("state")
        assert node.read(0, 6) == b"before"
    qemu.clean(path)


def _monitor(real, folder, path, command):
    done = real["qemu-system-x86_64"].run(
        *("-nodefaults", "-display", "none", "-monitor", "stdio", "-S", "-m", "16"),
        *("-drive", f"file={path},format=qcow2,if=virtio"),
        cwd=folder,
        stdin=f"{command}\nquit\n",
    )
    assert done.code == 0, done
    return done.out + done.err
