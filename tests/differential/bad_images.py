"""Images that no program should trust: cut off, bit-flipped, cyclic, overlapping, absurd.

Each is a valid image made by QEMU with one thing changed, so what is being tested is known.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.differential.programs import Program

SIZE = 8 << 20

Change = Callable[[bytearray], None]


class BadImage:
    """A name, the format it is opened as, and what is wrong with a valid image."""

    def __init__(self, name: str, format: str, change: Change, *, made_as: str = "") -> None:
        self.name = name
        self.format = format
        self.change = change
        self.made_as = made_as or format  # of the valid image; "none": an empty file

    def __str__(self) -> str:
        return self.name


def put(offset: int, layout: str, *values: int) -> Change:
    """Overwrite numbers."""

    def change(image: bytearray) -> None:
        struct.pack_into(layout, image, offset, *values)

    return change


def cut(size: int) -> Change:
    """Cut the file off; a negative size counts from its end."""

    def change(image: bytearray) -> None:
        del image[size:]

    return change


def flip(offset: int, bit: int = 0) -> Change:
    """Flip one bit."""

    def change(image: bytearray) -> None:
        image[offset] ^= 1 << bit

    return change


def become(content: bytes) -> Change:
    """Have other bytes."""

    def change(image: bytearray) -> None:
        image[:] = content

    return change


def at_l2(layout: str, *values: int, index: int = 0) -> Change:
    """Overwrite entries of the first L2 table."""

    def change(image: bytearray) -> None:
        l1 = struct.unpack_from(">Q", image, 40)[0]
        l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
        struct.pack_into(layout, image, l2 + 8 * index, *values)

    return change


def at_l1(value: int) -> Change:
    """Overwrite the first entry of the L1 table."""

    def change(image: bytearray) -> None:
        struct.pack_into(">Q", image, struct.unpack_from(">Q", image, 40)[0], value)

    return change


def at_refcounts(layout: str, *values: int) -> Change:
    """Overwrite the first entry of the refcount table."""

    def change(image: bytearray) -> None:
        struct.pack_into(layout, image, struct.unpack_from(">Q", image, 48)[0], *values)

    return change


def sealed_vhd(offset: int, layout: str, *values: int) -> Change:
    """Overwrite numbers of a VHD's footer copy, and make its checksum right again."""

    def change(image: bytearray) -> None:
        struct.pack_into(layout, image, offset, *values)
        struct.pack_into(">I", image, 64, 0)
        struct.pack_into(">I", image, 64, ~sum(image[:512]) & 0xFFFFFFFF)

    return change


_COPIED = 1 << 63

QCOW2 = [
    BadImage("qcow2 cut in its header", "qcow2", cut(60)),
    BadImage("qcow2 cut after its header", "qcow2", cut(512)),
    BadImage("qcow2 cut before its L1 table", "qcow2", cut(3 * 65536)),
    BadImage("qcow2 cut in its data", "qcow2", cut(-3 * 65536)),
    BadImage("qcow2 with a flipped magic", "qcow2", flip(0)),
    BadImage("qcow2 of version 9", "qcow2", put(4, ">I", 9)),
    BadImage("qcow2 with clusters of 2^63", "qcow2", put(20, ">I", 63)),
    BadImage("qcow2 with clusters of 1", "qcow2", put(20, ">I", 0)),
    BadImage("qcow2 of 2^63 bytes", "qcow2", put(24, ">Q", 1 << 63)),
    BadImage("qcow2 of 2^62 bytes", "qcow2", put(24, ">Q", 1 << 62)),
    BadImage("qcow2 with a size its L1 is too small for", "qcow2", put(24, ">Q", 1 << 40)),
    BadImage("qcow2 with unknown encryption", "qcow2", put(32, ">I", 3)),
    BadImage("qcow2 with an L1 of 2^31 entries", "qcow2", put(36, ">I", 0x7FFFFFFF)),
    BadImage("qcow2 with an L1 of 32 MiB", "qcow2", put(36, ">I", 4 << 20)),
    BadImage("qcow2 with an unaligned L1", "qcow2", put(40, ">Q", 0x30001)),
    BadImage("qcow2 with an L1 beyond the end", "qcow2", put(40, ">Q", 1 << 50)),
    BadImage("qcow2 with an unaligned refcount table", "qcow2", put(48, ">Q", 0x10001)),
    BadImage("qcow2 with a refcount table of 2^31 clusters", "qcow2", put(56, ">I", 0x7FFFFFFF)),
    BadImage("qcow2 with no refcount table", "qcow2", put(56, ">I", 0)),
    BadImage("qcow2 with 2^31 snapshots", "qcow2", put(60, ">I", 0x7FFFFFFF)),
    BadImage("qcow2 with 65536 snapshots", "qcow2", put(60, ">I", 65536)),
    BadImage("qcow2 with snapshots in its header", "qcow2", put(60, ">IQ", 1, 0)),
    BadImage("qcow2 with an unknown incompatible feature", "qcow2", put(72, ">Q", 1 << 40)),
    BadImage("qcow2 marked corrupt", "qcow2", put(72, ">Q", 2)),
    BadImage("qcow2 with refcounts of 2^7 bits", "qcow2", put(96, ">I", 7)),
    BadImage("qcow2 with a header of 2^31 bytes", "qcow2", put(100, ">I", 0x7FFFFFFF)),
    BadImage("qcow2 with a backing name beyond the end", "qcow2", put(8, ">QI", 1 << 40, 8)),
    BadImage("qcow2 with a backing name of 2^31 bytes", "qcow2", put(8, ">QI", 512, 0x7FFFFFFF)),
    BadImage("qcow2 with an extension of 2^31 bytes", "qcow2", put(112, ">II", 5, 0x7FFFFFFF)),
    BadImage("qcow2 whose L1 is its refcount table", "qcow2", put(40, ">Q", 0x10000)),
    BadImage("qcow2 with an L1 entry that is a flag only", "qcow2", at_l1(_COPIED)),
    BadImage("qcow2 whose L2 is its refcount block", "qcow2", at_l1(_COPIED | 0x20000)),
    BadImage("qcow2 whose L2 is its L1", "qcow2", at_l1(_COPIED | 0x30000)),
    BadImage("qcow2 whose L2 is unaligned", "qcow2", at_l1(_COPIED | 0x40200)),
    BadImage("qcow2 whose L2 is beyond the end", "qcow2", at_l1(_COPIED | 1 << 45)),
    BadImage("qcow2 whose data is its header", "qcow2", at_l2(">Q", _COPIED)),
    BadImage("qcow2 whose data is its refcount block", "qcow2", at_l2(">Q", _COPIED | 0x20000)),
    BadImage("qcow2 whose data is unaligned", "qcow2", at_l2(">Q", _COPIED | 0x50200)),
    BadImage("qcow2 whose data is beyond the end", "qcow2", at_l2(">Q", _COPIED | 1 << 45)),
    BadImage("qcow2 with one cluster used twice", "qcow2", at_l2(">QQ", *[_COPIED | 0x50000] * 2)),
    BadImage("qcow2 with garbage as compressed data", "qcow2", at_l2(">Q", 1 << 62 | 0x50000)),
    BadImage("qcow2 whose refcount block is its header", "qcow2", at_refcounts(">Q", 0)),
    BadImage("qcow2 whose refcount block is unaligned", "qcow2", at_refcounts(">Q", 0x20200)),
    BadImage("qcow2 whose refcount block is its table", "qcow2", at_refcounts(">Q", 0x10000)),
    BadImage("qcow2 whose refcount block is outside", "qcow2", at_refcounts(">Q", 1 << 45)),
]

VDI = [
    BadImage("vdi cut in its header", "vdi", cut(100)),
    BadImage("vdi cut in its map", "vdi", cut(520)),
    BadImage("vdi cut in its data", "vdi", cut(-100_000)),
    BadImage("vdi with a flipped signature", "vdi", flip(64)),
    BadImage("vdi of version 7", "vdi", put(68, "<I", 7)),
    BadImage("vdi of type 9", "vdi", put(76, "<I", 9)),
    BadImage("vdi with its map at 1", "vdi", put(340, "<I", 1)),
    BadImage("vdi of 2^62 bytes", "vdi", put(368, "<Q", 1 << 62)),
    BadImage("vdi with blocks of 0", "vdi", put(376, "<I", 0)),
    BadImage("vdi with 2^32 - 1 blocks", "vdi", put(384, "<I", 0xFFFFFFFF)),
    BadImage("vdi with 0 blocks", "vdi", put(384, "<I", 0)),
    BadImage("vdi with a wrong count", "vdi", put(388, "<I", 77)),
    BadImage("vdi with a block used twice", "vdi", put(512, "<II", 0, 0)),
    BadImage("vdi with a block beyond the end", "vdi", put(512, "<I", 5_000_000)),
]

VPC = [
    BadImage("vpc cut in its footer", "vpc", cut(100)),
    BadImage("vpc cut in its header", "vpc", cut(600)),
    BadImage("vpc cut in its data", "vpc", cut(-1_000_000)),
    BadImage("vpc with a flipped cookie", "vpc", flip(0)),
    BadImage("vpc with a wrong checksum", "vpc", flip(30)),
    BadImage("vpc with its header at 2^62", "vpc", sealed_vhd(16, ">Q", 1 << 62)),
    BadImage("vpc of type 9", "vpc", sealed_vhd(60, ">I", 9)),
    BadImage("vpc without a cookie in its header", "vpc", flip(512)),
    BadImage("vpc with 2^32 - 1 entries", "vpc", put(512 + 28, ">I", 0xFFFFFFFF)),
    BadImage("vpc with blocks of 3", "vpc", put(512 + 32, ">I", 3)),
    BadImage("vpc with its table at 2^60", "vpc", put(512 + 16, ">Q", 1 << 60)),
    BadImage("vpc with a block beyond the end", "vpc", put(1536, ">I", 0xFFFFFFF0)),
]

WRONG = [
    BadImage("an empty file", "qcow2", become(b"")),
    BadImage("an empty file as vdi", "vdi", become(b"")),
    BadImage("an empty file as vpc", "vpc", become(b"")),
    BadImage("a text", "qcow2", become(b"This is no image.\n" * 100)),
    BadImage("a program as vdi", "vdi", become(b"\x7fELF" + bytes(70_000))),
    BadImage("a vdi as qcow2", "qcow2", lambda image: None, made_as="vdi"),
    BadImage("a qcow2 as vdi", "vdi", lambda image: None, made_as="qcow2"),
    BadImage("a qcow2 as vpc", "vpc", lambda image: None, made_as="qcow2"),
    BadImage("a qcow2 as a format nobody knows", "nonsense", lambda i: None, made_as="qcow2"),
]

ALL = [*QCOW2, *VDI, *VPC, *WRONG]


def make_valid(folder: Path, real: dict[str, Program]) -> dict[str, bytes]:
    """A valid image of each format with something in it."""
    made = {}
    for format in ("qcow2", "vdi", "vpc"):
        path = folder / f"valid.{format}"
        words = ["create", "-q", "-f", format, str(path), str(SIZE)]
        assert real["qemu-img"].run(*words, cwd=folder).code == 0
        writes = ["-c", "write -P 17 0 200k", "-c", "write -P 18 3M 100k", "-c", "flush"]
        done = real["qemu-io"].run("-f", format, *writes, str(path), cwd=folder)
        assert done.code == 0, done
        made[format] = path.read_bytes()
    return made


def make(path: Path, bad: BadImage, valid: dict[str, bytes]) -> bytes:
    """Write the bad image; returns its bytes."""
    image = bytearray(valid[bad.made_as])
    bad.change(image)
    path.write_bytes(image)
    return bytes(image)
