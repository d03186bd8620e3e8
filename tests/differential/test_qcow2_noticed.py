"""Damage to qcow2 images that is noticed while they are used: the words and codes of QEMU."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.differential.io_pairs import IoPair, commands, timeless

pytestmark = pytest.mark.peer

PLAIN = "create -q -f qcow2 i 4M"
EXTENDED = "create -q -f qcow2 -o extended_l2=on i 4M"
L1, L2, DATA = 0x30000, 0x40000, 0x50000
COPIED = 1 << 63
MIB = 1 << 20


def damaged(real, io, folder: Path, *given: str, make: str = PLAIN, **kinds) -> IoPair:
    """Two images alike, after qemu-io's commands, and `kinds` "at" -> words written there."""
    pair = IoPair(real, io, folder, "qcow2")
    for place in pair.folders:
        (place / "i").unlink()
        pair.img(place, make)
        done = real["qemu-io"].run(*commands(given), "-f", "qcow2", "i", cwd=place)
        assert done.code == 0, done
        with open(place / "i", "r+b") as file:
            for at, words in kinds["at"].items():
                file.seek(at)
                file.write(struct.pack(f">{len(words)}Q", *words))
    return pair


def same(pair: IoPair, *given: str, expect: int | None = None) -> str:
    done = pair.same([*commands(given), *pair.opened], form=timeless, expect=expect)
    return done.out + done.err


@pytest.mark.parametrize(
    ("request_", "blanks"), [("read 64k 64k", 2), ("write 64k 64k", 1), ("write 68k 2k", 1)]
)
@pytest.mark.parametrize("bitmap", [0x1_FFFFFFFF, 0x1_00000001])
def test_an_entry_that_says_two_things(request_, blanks, bitmap, real, io, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, "write -q 64k 64k", make=EXTENDED, at={L2 + 24: [bitmap]})
    said = same(pair, request_, expect=1)
    assert f"Invalid cluster entry found{' ' * blanks}(L2 offset" in said


def test_a_compressed_cluster_that_is_no_stream(real, io, ours, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, "write -c -q -P 3 0 64k", at={DATA: [(1 << 64) - 1] * 4})
    assert "read failed: Input/output error" in same(pair, "read 0 64k", expect=1)
    pair.programs = (real["qemu-img"], ours)
    pair.same("convert -O raw i out", expect=1)


@pytest.mark.parametrize("make", [PLAIN, EXTENDED])
def test_a_cluster_that_cannot_be_freed(make, real, io, tmp_path) -> None:
    """It lies at no multiple of clusters: it leaks, and the image goes on being used."""
    pair = damaged(
        real, io, tmp_path, "write -q 0 128k", make=make, at={L2: [COPIED | DATA + 0x2A00]}
    )
    said = same(pair, "discard 0 64k", "write -q 1M 64k", "read 0 64k", expect=0)
    assert said.count("Cannot free unaligned cluster 0x52a00") == 1


def test_damage_that_matters_is_told_of_after_damage_that_does_not(real, io, tmp_path) -> None:
    pair = damaged(
        real,
        io,
        tmp_path,
        "write -q 0 128k",
        at={L2: [COPIED | DATA + 0x2A00, COPIED | DATA + 0x12A00]},
    )
    said = same(pair, "discard 0 64k", "read 64k 64k", expect=1)
    assert "Cannot free" in said
    assert "Marking image as corrupt" in said


def test_an_image_marked_as_corrupt_is_as_if_it_were_gone(real, io, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, "write -q 0 128k", at={L2: [COPIED | DATA + 0x2A00]})
    said = same(pair, "write 0 64k", "write 128k 64k", "discard 64k 64k", "aio_write 64k 4k")
    assert "No medium found" in said


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ("write -z -q 0 64k", {L1: [COPIED | L2 + 0x2A00]}),
        ("write -q 0 64k", {L2: [COPIED | DATA + 0x2A00 | 1]}),
    ],
)
def test_a_downgrade_of_what_lies_nowhere(given, at, real, io, ours, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, given, at=at)
    pair.programs = (real["qemu-img"], ours)
    done = pair.same("amend -o compat=0.10 i", expect=1)
    assert "Failed to turn zero into data clusters: Input/output error" in done.err


@pytest.mark.parametrize("host", [0xFFFFFF0000, 0x3FFFFFFFFF0000, 0x7FFF0000])
def test_a_snapshot_of_what_lies_far_away(host, real, io, ours, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, "write -q 0 64k", at={L2: [COPIED | host]})
    pair.programs = (real["qemu-img"], ours)
    done = pair.same("snapshot -c one i")
    assert done.code == (host > 0x7FFFFFFF)


@pytest.mark.parametrize(("at", "value"), [(0, 0x400200), (8, 1 << 60)])
@pytest.mark.parametrize(
    "request_",
    ["read 0 64k", "write 0 4k", "write 1M 64k", "discard 0 64k", "write -z 0 64k", "flush"],
)
def test_tables_that_are_to_be_guarded_and_not_found(
    request_, at, value, real, io, tmp_path
) -> None:
    """Of a snapshot which the L1 table cannot be one: nothing is written past the guard."""
    pair = damaged(real, io, tmp_path, "write -q 0 64k", at={})
    for folder in pair.folders:
        pair.img(folder, "snapshot -c one i")
        with open(folder / "i", "r+b") as file:
            file.seek(64)
            table = int.from_bytes(file.read(8), "big")
            file.seek(table + at)
            file.write(struct.pack(">Q", value) if not at else struct.pack(">I", value >> 32))
    words = ["-c", "open -o overlap-check.inactive-l2=on i", "-c", request_]
    done = pair.same(words, form=timeless)
    assert done.code == (request_ not in ("read 0 64k", "flush"))


@pytest.mark.parametrize(
    ("options", "bits"), [("refcount_bits=64", 64), ("refcount_bits=1", 1), ("compat=0.10", 16)]
)
def test_refcount_blocks_that_count_nothing_go(options, bits, real, io, ours, tmp_path) -> None:
    """As an image becomes shorter; each block that is named counts something."""
    make = f"create -q -f qcow2 -o cluster_size=512,{options} i 8M"
    pair = damaged(real, io, tmp_path, "write -q -P 5 0 8M", make=make, at={})
    pair.programs = (real["qemu-img"], ours)
    pair.same("resize -q -f qcow2 --shrink i 1M", expect=0)
    pair.same("check -q i", expect=0)
    for folder in pair.folders:
        image = (folder / "i").read_bytes()
        start, clusters = struct.unpack_from(">QI", image, 48)
        table = struct.unpack_from(f">{clusters * 64}Q", image, start)
        assert all(any(image[block : block + 512]) for block in table if block)
        before = 8 * MIB // 512 * bits // 8 // 512
        assert sum(map(bool, table)) <= max(before // 4, 1)
    pair.programs = (real["qemu-io"], io)
    said = same(pair, "read -P 5 0 1M", "write -q 0 1M", expect=0)
    assert "Pattern" not in said
    pair.img(pair.folders[1], "check -q i")


@pytest.mark.parametrize(
    ("bits", "at"),
    [(16, {0x10008: [0xFFFFFF00000000]}), (1, {0x10008: [0x1000000000]})],
)
def test_a_refcount_block_that_nothing_counts(bits, at, real, io, ours, tmp_path) -> None:
    """It is met as an image is to become shorter, which fails; it is named no more then."""
    make = f"create -q -f qcow2 -o refcount_bits={bits} i 64M"
    pair = damaged(real, io, tmp_path, make=make, at=at)
    pair.programs = (real["qemu-img"], ours)
    done = pair.same("resize --shrink i 32M", expect=1)
    assert "Failed to discard unused refblocks" in done.err
    assert all("virtual size: 64 MiB" in done.out for done in pair.run("info", "i"))
    pair.same("check -q -r all i", expect=0)
    pair.same("resize --shrink i 32M", expect=0)
    pair.same("check -q i", expect=0)


def test_a_refcount_block_that_an_unaligned_one_would_count(real, io, ours, tmp_path) -> None:
    at = {0x10008: [0x1000000000, 0x200]}
    pair = damaged(real, io, tmp_path, make="create -q -f qcow2 -o refcount_bits=1 i 64M", at=at)
    pair.programs = (real["qemu-img"], ours)
    done = pair.same("resize --shrink i 32M", expect=1)
    assert "Cannot get entry from refcount block cache" in done.err


@pytest.mark.parametrize(
    ("before", "at", "request_"),
    [
        ("read -q 0 64k", {0x10000: [0]}, "write 0 64k"),
        ("read -q 0 64k", {0x20000: [0]}, "write 0 64k"),
        ("write -q 64k 64k", {0x20000: [0]}, "write -c 0 64k"),
        ("write -q 64k 64k", {0x20000: [0]}, "write 0 64k"),
    ],
)
def test_refcounts_that_are_lost(before, at, request_, real, io, tmp_path) -> None:
    """What is in use looks free; nothing is written there."""
    pair = damaged(real, io, tmp_path, before, at=at)
    assert "Preventing invalid" in same(pair, request_, expect=1)


@pytest.mark.parametrize("make", [PLAIN, EXTENDED])
@pytest.mark.parametrize("request_", ["write -P 9 0 64k", "write -z 0 64k"])
@pytest.mark.parametrize(
    ("table", "at"), [("refcount table", 48), ("snapshot table", 64), ("active L1 table", 40)]
)
def test_a_table_that_lies_where_another_does(make, request_, table, at, real, io, tmp_path):
    """An entry written into it would be one of the other table's."""
    pair = damaged(real, io, tmp_path, "write -P 1 2M 64k", make=make, at={})
    pair.img(pair.folders[0], "snapshot -c one i")
    image = bytearray((pair.folders[0] / "i").read_bytes())
    (place,) = struct.unpack_from(">Q", image, at)
    (l1,) = struct.unpack_from(">Q", image, 40)
    struct.pack_into(">Q", image, l1, COPIED | place)
    for folder in pair.folders:
        (folder / "i").write_bytes(image)
    said = same(pair, request_, request_, "discard 0 64k", expect=1)
    assert f"overlaps with {table}" in said or "Invalid cluster entry found" in said
    left = (pair.folders[1] / "i").read_bytes()
    assert left[place : place + 512] == image[place : place + 512]


@pytest.mark.parametrize("line", ["check -r all i", "resize i 5M", "snapshot -c s i", "info i"])
def test_a_bitmap_directory_without_an_end(line, real, io, ours, tmp_path) -> None:
    pair = damaged(real, io, tmp_path, at={})
    pair.programs = (real["qemu-img"], ours)
    pair.prepare("bitmap --add i noted")
    for folder in pair.folders:
        image = bytearray((folder / "i").read_bytes())
        image[image.index(bytes.fromhex("23852875")) + 16] = 0x40
        (folder / "i").write_bytes(image)
    pair.same(line, expect=1)
