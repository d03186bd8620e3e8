"""Damaged qcow2 images: found, counted, told and repaired as qemu-img does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from diskwright.block.info import Repair
from diskwright.errors import IOFailure
from tests.unit.qcow2_images import MIB, Fields, Qemu, create, memory_folder, opened

Damage = Callable[[Fields], None]
CLUSTER = 65536
FLAG = 1 << 63


tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


def count(cluster: int, value: int) -> Damage:
    """A refcount of an image with 16 bits."""
    return lambda f: f.put(f.block + 2 * cluster, value, ">H")


def both(*damages: Damage) -> Damage:
    def apply(fields: Fields) -> None:
        for damage in damages:
            damage(fields)

    return apply


def longer(fields: Fields) -> None:
    os.truncate(fields.path, 20 * CLUSTER)


def cut(clusters: int) -> Damage:
    return lambda f: os.truncate(f.path, clusters * CLUSTER)


def l1(change: Callable[[int], int]) -> Damage:
    return lambda f: f.put(f.l1, change(f.get(f.l1)))


def l2(index: int, change: Callable[[int], int]) -> Damage:
    return lambda f: f.put(f.l2 + 8 * index, change(f.get(f.l2 + 8 * index)))


def table(index: int, change: Callable[[int], int]) -> Damage:
    return lambda f: f.put(f.table + 8 * index, change(f.get(f.table + 8 * index)))


#: The image: clusters 0 to 3 hold header, refcount table, block, L1 table; 4 the L2 table, 5 to 8
#: data; guest cluster 8 is a zero cluster, 11 is compressed into cluster 9.
PLAIN: dict[str, Damage] = {
    "nothing": lambda f: None,
    "leak": both(longer, count(12, 1)),
    "leak behind the end": count(12, 1),
    "too high": count(6, 2),
    "header too high": both(count(0, 9), count(1, 5)),
    "two of them": both(count(7, 3), l2(3, lambda e: e & ~FLAG), l1(lambda e: e & ~FLAG)),
    "L1 flag": l1(lambda e: e & ~FLAG),
    "L2 flag": l2(0, lambda e: e & ~FLAG),
    "L1 reserved": l1(lambda e: e | 1 | 1 << 60),
    "L2 reserved": l2(0, lambda e: e | 2 | 1 << 60),
    "L1 unaligned": l1(lambda e: e + 512),
    "L1 far away": l1(lambda e: FLAG | 1 << 40),
    "L1 at the end": l1(lambda e: FLAG | 10 * CLUSTER),
    "L2 unaligned": l2(0, lambda e: e + 512),
    "zero unaligned": l2(0, lambda e: e + 513),
    "L2 far away": l2(0, lambda e: FLAG | 1 << 40),
    "L2 behind the end": l2(0, lambda e: FLAG | 11 * CLUSTER),
    "L2 twice": lambda f: f.put(f.l2, f.get(f.l2 + 8)),
    "L2 on a table": l2(0, lambda e: FLAG | CLUSTER),
    "no offset": l2(0, lambda e: FLAG),
    "flag of a zero": l2(8, lambda e: FLAG | 1),
    "flag of a payload": l2(11, lambda e: e | FLAG),
    "payload far away": l2(11, lambda e: 1 << 62 | 1 << 40),
    "payload too long": l2(11, lambda e: 1 << 62 | 0x7F << 55 | (11 * CLUSTER - 512)),
    "block far away": table(1, lambda e: 1 << 40),
    "dirty": lambda f: f.put(72, 1),
    "corrupt": lambda f: f.put(72, 2),
    "cut": cut(7),
    "cut more": cut(4),
}

#: What can only be mended by making the refcount structures anew.
REBUILT: dict[str, Damage] = {
    "too low": count(6, 0),
    "header too low": count(0, 0),
    "low and high": both(count(6, 0), count(7, 3), l2(3, lambda e: e & ~FLAG)),
    "payload too low": count(9, 0),
    "block twice": lambda f: f.put(f.table + 8, f.block),
    "no block": table(0, lambda e: 0),
    "block elsewhere": table(0, lambda e: 4 * CLUSTER),
    "block reserved": table(0, lambda e: e + 1),
    "L1 on the refcount table": l1(lambda e: FLAG | CLUSTER),
}

#: Of an image with a snapshot whose L1 table is cluster 10, and the table cluster 11.
SNAPPED: dict[str, Damage] = {
    "nothing": lambda f: None,
    "too low": count(7, 1),
    "L1 unaligned": lambda f: f.put(f.snapshots, 512),
    "L1 far away": lambda f: f.put(f.snapshots, 1 << 40),
    "L1 entry reserved": lambda f: f.put(f.get(f.snapshots), f.get(f.get(f.snapshots)) | 1),
    "name too long": lambda f: f.put(f.snapshots + 14, 60000, ">H"),
}

#: Errors that qemu-img finds and leaves.
SNAPSHOT_TABLES: dict[str, Damage] = {
    "L1 too long": lambda f: f.put(f.snapshots + 8, 5 << 20, ">I"),
    "table far away": lambda f: f.put(64, f.snapshots + (1 << 40)),
    "old entry": lambda f: f.put(f.snapshots + 36, 8, ">I"),
    "too many": lambda f: f.put(60, 3, ">I"),
}


def make(qemu, path, damage, *, snapshot=False):
    create(path, MIB)
    qemu.io(path, "w -q -P 1 0 256k", "w -q -z 512k 64k", "w -q -c -P 1 704k 64k")
    if snapshot:
        qemu.img("snapshot", "-c", "a", path)
        qemu.io(path, "w -q -P 2 0 64k")
    damage(Fields(path))


def ours(path, repair=Repair.NONE):
    """(lines, result, result of a second look) of our check."""
    lines: list[str] = []
    with opened(path, read_only=repair == Repair.NONE, checks=True) as node:
        first = result = node.check(repair, lines.append)
        if first.leaks_fixed or first.corruptions_fixed:
            result = node.check(Repair.NONE, lines.append)
    members = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "check-errors": result.check_errors,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": first.corruptions_fixed,
        "leaks-fixed": first.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return lines, members


def theirs(qemu, path, *flags):
    done = qemu.img("check", "--output=json", *flags, "-f", "qcow2", path, fails=True)
    import json

    members = json.loads(done.out)
    return done.err.splitlines(), {
        name: members.get(name, 0)
        for name in (
            *("image-end-offset", "total-clusters", "check-errors", "corruptions", "leaks"),
            *("corruptions-fixed", "leaks-fixed", "allocated-clusters", "fragmented-clusters"),
            "compressed-clusters",
        )
    }


def looks_alike(qemu, path):
    wanted = theirs(qemu, path)
    before = path.read_bytes()
    assert ours(path) == wanted
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", PLAIN)
def test_damage_is_told_and_repaired_as_qemu_does(qemu, tmp_path, name):
    path, copy = tmp_path / "damaged.qcow2", tmp_path / "copy.qcow2"
    make(qemu, path, PLAIN[name])
    looks_alike(qemu, path)
    for word, repair in (("leaks", Repair.LEAKS), ("all", Repair.ALL)):
        shutil.copy(path, copy)
        wanted = theirs(qemu, copy, "-r", word)
        after = theirs(qemu, copy)
        shutil.copy(path, copy)
        if word == "all" and name == "block far away":
            ours(copy, repair)  # QEMU makes the file a terabyte long here
            qemu.clean(copy)
            continue
        assert ours(copy, repair) == wanted
        assert theirs(qemu, copy) == after
        looks_alike(qemu, copy)


@pytest.mark.parametrize("name", SNAPPED)
def test_damage_to_snapshots_is_told_and_repaired_as_qemu_does(qemu, tmp_path, name):
    path, copy = tmp_path / "damaged.qcow2", tmp_path / "copy.qcow2"
    make(qemu, path, SNAPPED[name], snapshot=True)
    looks_alike(qemu, path)
    for word, repair in (("leaks", Repair.LEAKS), ("all", Repair.ALL)):
        shutil.copy(path, copy)
        wanted = theirs(qemu, copy, "-r", word)
        shutil.copy(path, copy)
        assert ours(copy, repair) == wanted


@pytest.mark.parametrize("name", SNAPSHOT_TABLES)
def test_damaged_snapshot_tables_are_told_as_qemu_does(qemu, tmp_path, name):
    path = tmp_path / "damaged.qcow2"
    make(qemu, path, SNAPSHOT_TABLES[name], snapshot=True)
    looks_alike(qemu, path)


def test_extra_data_that_are_too_long_are_cut_off(qemu, tmp_path):
    path = tmp_path / "extra.qcow2"
    make(qemu, path, lambda f: f.put(f.snapshots + 36, 2000, ">I"), snapshot=True)
    for repair in (Repair.NONE, Repair.LEAKS):
        with pytest.raises(IOFailure) as caught:
            ours(path, repair)
        assert caught.value.qemu_message == "File too large"
    lines, members = ours(path, Repair.ALL)
    assert lines == ["Discarding too much extra metadata in snapshot table entry 0 (2000 > 1024)"]
    assert members["corruptions-fixed"] == 1
    qemu.clean(path)


@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_a_snapshot_table_that_ends_behind_the_file_is_not_given_away(qemu, tmp_path, repair):
    """An entry with a name far too long makes it so; QEMU's repair frees the table, and others'."""
    path = tmp_path / "long.qcow2"
    create(path, MIB, cluster_size=4096)
    qemu.io(path, "w -q -P 1 0 64k")
    qemu.img("snapshot", "-c", "kept", path)
    qemu.io(path, "w -q -P 2 0 64k")
    qemu.img("snapshot", "-c", "long", path)
    place = Fields(path).snapshots
    size = int.from_bytes(path.read_bytes()[place + 36 : place + 40], "big")
    second = place + -(-(40 + size + 1 + len("kept")) // 8) * 8
    Fields(path).put(second + 14, 0xFFFF, ">H")
    Fields(path).put(second + 40 + size, 0xFF, ">B")  # nor is its id text, and stays what it is
    table = path.read_bytes()[place : second + 40]
    looks_alike(qemu, path)
    lines, _ = ours(path, repair)
    assert any("exceeding the end of the file" in line for line in lines)
    if repair == Repair.LEAKS:
        assert path.read_bytes()[place : second + 40] == table
        ours(path, Repair.ALL)
    qemu.clean(path)
    with opened(path) as node:
        assert [one.id for one in node.snapshots()] == ["1", "\udcff"]
        node.write(0, bytes([3]) * 65536)
    qemu.img("snapshot", "-a", "kept", path)
    with opened(path, read_only=True) as node:
        assert node.read(0, 65536) == bytes([1]) * 65536


@pytest.mark.parametrize("name", REBUILT)
def test_refcounts_are_made_anew(qemu, tmp_path, name):
    path, copy = tmp_path / "damaged.qcow2", tmp_path / "copy.qcow2"
    make(qemu, path, REBUILT[name])
    looks_alike(qemu, path)
    shutil.copy(path, copy)
    assert qemu.img("check", "-r", "leaks", "-f", "qcow2", copy, fails=True).code == 1
    shutil.copy(path, copy)
    with pytest.raises(IOFailure) as caught:
        ours(copy, Repair.LEAKS)
    assert caught.value.qemu_message == "Input/output error"
    assert copy.read_bytes() == path.read_bytes()
    with opened(path, read_only=True) as node:
        before = node.read(CLUSTER, MIB - CLUSTER)
    _, members = ours(path, Repair.ALL)
    assert members["corruptions-fixed"] + members["leaks-fixed"] > 0
    qemu.clean(path)
    with opened(path) as node:
        assert node.read(CLUSTER, MIB - CLUSTER) == before
        node.write(0, os.urandom(MIB))
    qemu.clean(path)


def test_bitmaps_are_counted_and_survive_a_repair(qemu, tmp_path):
    path = tmp_path / "bitmaps.qcow2"
    create(path, 8 * MIB)
    qemu.img("bitmap", "--add", path, "first")
    qemu.img("bitmap", "--add", "-g", "4096", path, "second")
    qemu.io(path, "w -q 0 1M")
    os.truncate(path, path.stat().st_size // CLUSTER * CLUSTER + 20 * CLUSTER)
    Fields(path).put(Fields(path).block + 2 * 60, 1, ">H")
    looks_alike(qemu, path)
    ours(path, Repair.LEAKS)
    qemu.clean(path)
    said = qemu.json("info", "--output=json", path)
    with opened(path, read_only=True) as node:
        assert node.info().format_specific == said["format-specific"]["data"]
    names = [bitmap["name"] for bitmap in said["format-specific"]["data"]["bitmaps"]]
    assert names == ["first", "second"]
    with opened(path) as node:
        assert list(node.dirty_bitmap("second").runs()) == [(0, MIB)]


def test_random_damage_is_counted_as_qemu_counts_it(qemu, tmp_path, rng):
    path, good = tmp_path / "random.qcow2", tmp_path / "good.qcow2"
    make(qemu, good, lambda f: None, snapshot=True)
    fields = Fields(good)
    places = [fields.l1, fields.l2, fields.block, fields.table]
    for _ in range(25):
        shutil.copy(good, path)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice(places) + rng.randrange(12) * 8 + rng.choice([0, 5, 6, 7])
            Fields(path).put(at, rng.choice([0, 1, 2, 0x80, rng.randrange(256)]), ">B")
        wanted = theirs(qemu, path)
        found = ours(path)
        assert found == wanted
