"""Commands at damaged qcow2 images: the same words, exit codes and repairs as QEMU's."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, timeless
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

#: Ours writes a new table before it gives the old one up.
_END = re.compile(r"Image end offset: \d+")


def form(text: str) -> str:
    """Output without what depends on the clock, the file system and free places."""
    return timeless(_END.sub("Image end offset", text))


@pytest.fixture
def pair(real, ours, tmp_path) -> Pair:
    return Pair(real["qemu-img"], ours, tmp_path)


def put(pair: Pair, name: str, offset: int, data: bytes) -> None:
    """The same damage on both sides."""
    for folder in pair.folders:
        with open(folder / name, "r+b") as file:
            file.seek(offset)
            file.write(data)


def made(pair: Pair, qemu: Program, *lines: str) -> None:
    """The same images on both sides, made by QEMU's program."""
    for folder in pair.folders:
        for line in lines:
            done = qemu.run(*line.split(), cwd=folder)
            assert done.code == 0, done


def field(path: Path, offset: int, form: str = ">Q") -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]


@pytest.mark.parametrize(
    ("extra", "number"),
    [(1025, 0), (2000, 0), (2000, 1), (100_000, 0), (200_000, 1), ((1 << 32) - 1, 0)],
)
def test_a_snapshot_with_too_much_extra_data(pair, real, extra, number):
    lines = [f"snapshot -c {name} x" for name in ("one", "two")]
    made(pair, real["qemu-img"], "create -q -f qcow2 x 1M", *lines)
    table = field(pair.folders[0] / "x", 64)
    entry = table + number * 72  # 40 bytes, 24 of extra data, id and name: a multiple of eight
    put(pair, "x", entry + 36, struct.pack(">I", extra))
    for line in ("info x", "map x", "check x", "check -r leaks x", "snapshot -l x"):
        pair.same(line, expect=1)
    wanted, got = pair.run("check", "-r", "all", "x")
    assert got.code == wanted.code == 0
    # QEMU gives up what nothing refers to, and says that it cannot
    told = wanted.err.replace("qcow2_free_clusters failed: Invalid argument\n", "")
    assert (form(got.out), got.err) == (form(wanted.out), told)
    pair.same("check x", form=form, expect=0)
    pair.same("snapshot -l x", form=form, expect=0)


def test_a_snapshot_table_that_is_too_long(pair, real):
    """Its entries have names of 128 KiB, so that not all of them may be kept."""
    made(pair, real["qemu-img"], "create -q -f qcow2 x 1M", "snapshot -c one x")
    position = field(pair.folders[0] / "x", 64)
    put(pair, "x", 60, struct.pack(">I", 600))
    for _ in range(600):
        entry = struct.pack(">QIHHIIQII", 0x50000, 1, 65535, 65535, 0, 0, 0, 0, 16)
        put(pair, "x", position, entry)
        position = (position + len(entry) + 16 + 2 * 65535 + 7) & ~7
    put(pair, "x", position - 1, b"\0")
    pair.same("info x", expect=1)
    pair.same("check x", expect=1)


@pytest.mark.parametrize(("offset", "form", "value"), [(60, ">I", 65537), (64, ">Q", 512)])
def test_a_snapshot_table_that_cannot_be(pair, real, offset, form, value):
    made(pair, real["qemu-img"], "create -q -f qcow2 x 1M")
    put(pair, "x", offset, struct.pack(form, value))
    for line in ("info x", "check x", "check -r leaks x"):
        pair.same(line, expect=1)


@pytest.mark.parametrize("count", [65537, 1 << 30, (1 << 32) - 1])
def test_an_absurd_number_of_snapshots_is_mended(pair, real, ours, count):
    """QEMU 10.0.2 takes what follows the table for snapshots, and marks the image as corrupt."""
    made(pair, real["qemu-img"], "create -q -f qcow2 x 1M", "snapshot -c one x")
    put(pair, "x", 60, struct.pack(">I", count))
    for line in ("info x", "check x", "check -r leaks x"):
        pair.same(line, expect=1)
    folder = pair.folders[1]
    done = ours.run("check", "-r", "all", "x", cwd=folder)
    assert done.code == 0
    assert done.err.splitlines()[0] == f"Discarding {count - 1} overhanging snapshots"
    for program in (ours, real["qemu-img"]):
        assert program.run("check", "x", cwd=folder).code == 0
        assert "one" in program.run("snapshot", "-l", "x", cwd=folder).out


@pytest.mark.parametrize("line", ["check x", "check -r leaks x", "check -r all x"])
def test_nothing_is_freed_where_a_snapshots_table_is_in_no_file(pair, real, line):
    """What it names has no other reference: with the one bit put back all of it is there."""
    made(pair, real["qemu-img"], "create -q -f qcow2 -o cluster_size=4k x 8M")
    for folder in pair.folders:
        assert real["qemu-io"].run("-c", "write -P 1 0 300k", "x", cwd=folder).code == 0
    made(pair, real["qemu-img"], "snapshot -c one x")
    position = field(pair.folders[0] / "x", 64)
    put(pair, "x", position, b"\x80")
    before = (pair.folders[1] / "x").read_bytes()
    pair.same(line, expect=1)
    assert (pair.folders[1] / "x").read_bytes() == before


@pytest.mark.parametrize("line", ["check x", "check -r leaks x", "check -r all x"])
def test_nothing_is_freed_where_a_bitmaps_table_is_in_no_file(pair, real, ours, line):
    made(pair, real["qemu-img"], "create -q -f qcow2 x 8M", "bitmap --add x noted")
    for folder in pair.folders:
        assert real["qemu-io"].run("-c", "write -P 1 0 1M", "x", cwd=folder).code == 0
    image = (pair.folders[1] / "x").read_bytes()
    extension = image.index(bytes.fromhex("23852875"))
    put(pair, "x", struct.unpack_from(">Q", image, extension + 24)[0], b"\x80")
    before = (pair.folders[1] / "x").read_bytes()
    wanted, got = pair.run(*line.split())
    sentence = "Could not read bitmap_table table from image for bitmap 'noted'"
    for done in (wanted, got):
        assert done.code == 1 and sentence in done.err, done
    assert (pair.folders[1] / "x").read_bytes() == before


@pytest.mark.parametrize("plus", [0, 1 << 63])
def test_version_2_with_the_flag_of_a_zero_cluster(pair, real, plus):
    """A bit that version 2 does not have; a check looks at it no more than QEMU's does."""
    made(pair, real["qemu-img"], "create -q -f qcow2 -o compat=0.10 x 1M")
    for folder in pair.folders:
        assert real["qemu-io"].run("-c", "write 0 128k", "x", cwd=folder).code == 0
    l2 = field(pair.folders[0] / "x", field(pair.folders[0] / "x", 40)) & ~(1 << 63)
    entry = field(pair.folders[0] / "x", l2)
    put(pair, "x", l2, struct.pack(">Q", (entry & ~(1 << 63)) | plus | 1))
    pair.same("check x")
    pair.same("check -r all x")
    pair.same("check x")


@pytest.mark.parametrize("size", [(1 << 64) - 1, (1 << 64) - (1 << 29), 1 << 63, (1 << 63) - 1])
def test_sizes_that_no_disk_has(pair, real, size):
    made(pair, real["qemu-img"], "create -q -f qcow2 x 1M")
    put(pair, "x", 24, struct.pack(">Q", size))
    pair.same("info x", expect=1)


@pytest.mark.parametrize(("place", "value"), [(16, b"\xff" * 8), (24, b"\xff" * 8), (8, b"\xff")])
def test_bitmaps_that_cannot_be_are_told_before_a_data_file_that_is_not(pair, real, place, value):
    made(pair, real["qemu-img"], "create -q -f qcow2 -o data_file=d.raw a.qcow2 8M")
    made(pair, real["qemu-img"], "bitmap --add a.qcow2 b0")
    for folder in pair.folders:
        (folder / "d.raw").unlink()
    image = (pair.folders[0] / "a.qcow2").read_bytes()
    extension = image.index(struct.pack(">LL", 0x23852875, 24), 100, 4096)
    put(pair, "a.qcow2", extension + place, value)
    for line in ("info a.qcow2", "resize a.qcow2 9M", "map a.qcow2", "check a.qcow2"):
        wanted = pair.same(line, expect=1)
        assert "bitmaps_ext" in wanted.err
