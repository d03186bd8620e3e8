"""Bitmaps that lie, and those that a writer which knew none left: refused or told as QEMU does."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import DiskwrightError
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program
from tests.differential.test_img_bitmap import bits_of, lengthless, same_bitmaps

pytestmark = pytest.mark.peer


class Places:
    """Where the fields of an image with the bitmaps "one" and "two" lie."""

    def __init__(self, data: bytes) -> None:
        self.extension = data.find(bytes.fromhex("2385287500000018"), 0, 1024)
        count, _, self.size, self.directory = struct.unpack_from(">IIQQ", data, self.extension + 8)
        assert count == 2
        (self.table,) = struct.unpack_from(">Q", data, self.directory)
        (self.cluster,) = struct.unpack_from(">Q", data, self.table)


#: name -> (where, format, value); the value may use the number that is there.
DAMAGE = {
    "count 0": ("extension+8", "I", 0),
    "count 1": ("extension+8", "I", 1),
    "count 3": ("extension+8", "I", 3),
    "count 70000": ("extension+8", "I", 70000),
    "reserved": ("extension+12", "I", 1),
    "no directory": ("extension+16", "Q", 0),
    "directory longer": ("extension+16", "Q", 72),
    "directory shorter": ("extension+16", "Q", 56),
    "directory huge": ("extension+16", "Q", 1 << 40),
    "directory at 0": ("extension+24", "Q", 0),
    "directory not aligned": ("extension+24", "Q", 520),
    "directory outside": ("extension+24", "Q", 1 << 40),
    "extension short": ("extension+4", "I", 16),
    "table at 0": ("directory", "Q", 0),
    "table not aligned": ("directory", "Q", 65544),
    "no table": ("directory+8", "I", 0),
    "table too long": ("directory+8", "I", 2),
    "table huge": ("directory+8", "I", 0xFFFFFFFF),
    "extra data must be known": ("directory+12", "I", 6),
    "unknown flag": ("directory+12", "I", 0x102),
    "highest flag": ("directory+12", "I", 0x80000002),
    "in use": ("directory+12", "I", 3),
    "not enabled": ("directory+12", "I", 0),
    "type 0": ("directory+16", "B", 0),
    "type 2": ("directory+16", "B", 2),
    **{f"granularity {n}": ("directory+17", "B", n) for n in (0, 8, 9, 31, 32, 63, 64, 255)},
    "no name": ("directory+18", "H", 0),
    "shorter name": ("directory+18", "H", 2),
    "name too long": ("directory+18", "H", 60000),
    "extra data": ("directory+20", "I", 8),
    "extra data huge": ("directory+20", "I", 0xFFFFFFFF),
    "two of one name": ("directory+24", "3s", b"two"),
    "zero byte in a name": ("directory+24", "3s", b"o\0e"),
    "no UTF-8": ("directory+24", "3s", b"o\xffe"),
    "all ones": ("table", "Q", 1),
    "reserved bit": ("table", "Q", 1 << 60 | 1 << 16),
    "low reserved bit": ("table", "Q", 2 | 1 << 16),
    "cluster not aligned": ("table", "Q", (1 << 16) + 512),
    "ones and a cluster": ("table", "Q", (1 << 16) + 1),
}


@pytest.fixture(scope="module")
def marked(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("marked")
    for line in (
        "create -q -f qcow2 m.q 10M",
        "bitmap --add -g 4096 m.q one",
        "bitmap --add m.q two",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    real["qemu-io"].run("-f", "qcow2", "-c", "write 1M 1M", "m.q", cwd=folder)
    return (folder / "m.q").read_bytes()


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, marked: bytes, real, ours, tmp_path: Path) -> None:
    where, form, value = DAMAGE[name]
    base, _, more = where.partition("+")
    data = bytearray(marked)
    struct.pack_into(f">{form}", data, getattr(Places(marked), base) + int(more or 0), value)
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        (folder / "m.q").write_bytes(data)
    for line in ("info m.q", "check m.q", "bitmap --disable m.q two", "info m.q"):
        done = pair.same(line, form=lengthless)
    if done.code == 0 and "in use" not in name:
        codes = [real["qemu-img"].run("check", "m.q", cwd=folder).code for folder in pair.folders]
        assert codes[0] == codes[1]


def test_a_writer_that_knew_no_bitmaps_makes_them_stale(marked, real, ours, tmp_path: Path) -> None:
    """A line of QEMU's ends without an end: whichever comes next stands behind it."""
    data = bytearray(marked)
    data[88:96] = bytes(8)  # the autoclear features
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        (folder / "m.q").write_bytes(data)
    for line in (
        "info m.q",
        "bitmap --disable m.q two",
        "check m.q",
        "bitmap --add m.q one",
        "check -r leaks m.q",
        "info m.q",
    ):
        pair.same(line, form=lengthless)
    same_bitmaps(real, pair, "m.q")


def test_stale_bitmaps_are_told_before_a_missing_data_file(marked, real, ours, tmp_path) -> None:
    data = bytearray(marked)
    data[88:96] = (2).to_bytes(8, "big")  # its data file would be raw, and it has none
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        (folder / "m.q").write_bytes(data)
    for line in ("info m.q", "check m.q", "map m.q", "bitmap --add m.q one"):
        pair.same(line, form=lengthless)


def test_no_clean_end_while_it_cannot_be_saved(real, tmp_path: Path) -> None:
    """A table that lies outside of the file is full of zeroes for QEMU, and so it is here."""
    image = tmp_path / "m.q"
    diskwright.create(image, "1M", format="qcow2")
    diskwright.bitmap(image, "one", "add")
    data = bytearray(image.read_bytes())
    place = data.find(bytes.fromhex("2385287500000018"), 0, 512)
    (directory,) = struct.unpack_from(">Q", data, place + 24)
    struct.pack_into(">Q", data, directory, 1 << 40)
    image.write_bytes(data)
    with diskwright.open(image, read_only=False) as node:
        node.write(0, b"x")
    assert bits_of(real, image, "one") == [(0, 65536)]
    diskwright.bitmap(image, "one", "remove")
    with pytest.raises(DiskwrightError, match="not found"):
        diskwright.bitmap(image, "one", "remove")
