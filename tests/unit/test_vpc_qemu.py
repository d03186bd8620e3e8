"""VHD images beside QEMU: the same bytes, sizes, content, maps, and words about damaged ones."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.drivers.formats.vpc.header import SECTOR, checksum
from diskwright.errors import OptionError
from tests.unit.vm_images import (
    content,
    create,
    opened,
    our_map,
    qemu,
    qemu_content,
    qemu_create,
    qemu_map,
    qemu_opens,
    qemu_scribble,
    scribble,
    we_open_here,
)

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("real")]

MIB, GIB = 1 << 20, 1 << 30
LARGEST_GEOMETRY = 65535 * 16 * 255 * SECTOR
VARIANTS: list[dict[str, object]] = [
    {},
    {"subformat": "fixed"},
    {"force_size": "on"},
    {"subformat": "fixed", "force_size": "on"},
    {"subformat": "dynamic", "force_size": "off"},
]
SIZES = [
    *(0, 1, 511, 512, 513, 34816, 34817, 100_000, 10 * MIB, 504 * MIB, 504 * MIB + 512),
    *(65535 * 16 * 63 * SECTOR - 512, 65535 * 16 * 63 * SECTOR, 65535 * 16 * 63 * SECTOR + 512),
    *(LARGEST_GEOMETRY - 512, LARGEST_GEOMETRY, LARGEST_GEOMETRY + 512, 128 * GIB, 2040 * GIB),
]


def ids(options: object) -> str:
    return (
        "-".join(map(str, options.values())) if isinstance(options, dict) and options else "plain"
    )


def without_identity(raw: bytes) -> bytes:
    """Bytes of an image without its footers' times, checksums and identifiers."""
    plain = bytearray(raw)
    for start in {0, len(raw) - SECTOR}:
        if raw[start : start + 8] == b"conectix":
            plain[start + 24 : start + 28] = bytes(4)
            plain[start + 64 : start + 84] = bytes(20)
    return bytes(plain)


def sealed(raw: bytearray, start: int) -> None:
    """Put the right checksum into the footer at `start`."""
    start %= len(raw)
    right = checksum(bytes(raw[start : start + SECTOR]), 64)
    raw[start + 64 : start + 68] = right.to_bytes(4, "big")


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_what_is_created_is_what_qemu_creates(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / "ours.vhd"
    some = [rng.randrange(1 << rng.randrange(12, 37)) for _ in range(12)]
    for size in SIZES + some:
        if options.get("subformat") == "fixed" and size > 8 * MIB:
            size = size % (8 * MIB)
        assert qemu_create("vpc", theirs, size, **options) == ""
        create("vpc", ours, -(-size // SECTOR) * SECTOR, **options)
        assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes()), size
        assert qemu_opens("vpc", theirs) == we_open_here("vpc", theirs), size
        assert qemu_opens("vpc", ours) == we_open_here("vpc", ours), size


def test_sizes_that_qemu_refuses_are_refused_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    for size in (2040 * GIB + 512, 3 << 40, 1 << 50):
        said = qemu_create("vpc", path, size)
        with pytest.raises(OptionError) as caught:
            diskwright.create(tmp_path / "ours.vhd", size, format="vpc")
        ours = caught.value.qemu_message.removeprefix(str(tmp_path / "ours.vhd"))
        assert said == f"qemu-img: disk.vhd{ours}\n"
        assert not (tmp_path / "ours.vhd").exists()


@pytest.mark.parametrize(
    "options",
    [*VARIANTS[:3], {"block_size": 4096}, {"block_size": 65536}, {"block_size": 8 * MIB}],
    ids=ids,
)
def test_both_write_one_image_in_turns(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, rng.randrange(3 * MIB, 20 * MIB) // 512 * 512, **options)
    model = bytearray(len(content("vpc", path)))
    for turn in range(4):
        if turn % 2:
            qemu_scribble("vpc", path, model, rng, 6)
        else:
            with opened("vpc", path, writable=True) as node:
                scribble(node, model, rng, 6)
        assert content("vpc", path) == model
        assert qemu_content("vpc", path) == model
        with opened("vpc", path) as node:
            found = node.check()
            assert found.clean
            assert found.image_end_offset in (0, path.stat().st_size)
        assert our_map("vpc", path) == qemu_map("vpc", path)


def test_the_same_writes_leave_the_same_file(tmp_path: Path, rng: random.Random) -> None:
    """Blocks in the order of their first writes, a footer after the last one."""
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / "ours.vhd"
    assert qemu_create("vpc", theirs, 30 * MIB) == ""
    ours.write_bytes(theirs.read_bytes())
    offsets = [rng.randrange(30 * MIB - 5000) for _ in range(10)]
    words = [word for offset in offsets for word in ("-c", f"write -P 7 {offset} 5000")]
    assert qemu("qemu-io", "-f", "vpc", *words, theirs.name, cwd=tmp_path).returncode == 0
    with opened("vpc", ours, writable=True) as node:
        for offset in offsets:
            node.write(offset, b"\x07" * 5000)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_disk_beyond_the_largest_geometry(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, 200 * GIB)
    with opened("vpc", path, writable=True) as node:
        assert node.size == 200 * GIB
        for offset in (0, 127 * GIB - 3, 200 * GIB - 6):
            node.write(offset, b"marker")
    words = [f"read -P {ord('m')} {offset} 1" for offset in (0, 127 * GIB - 3, 200 * GIB - 6)]
    given = [part for word in words for part in ("-c", word)]
    done = qemu("qemu-io", "-rf", "vpc", *given, path.name, cwd=tmp_path)
    assert "ailed" not in done.stdout + done.stderr, done.stdout
    assert our_map("vpc", path) == qemu_map("vpc", path)


@pytest.mark.parametrize(
    "creator",
    [b"vpc ", b"vs  ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"vbox", b"\0\0\0\0"],
)
@pytest.mark.parametrize("geometry", [None, (65535, 16, 255), (1, 1, 1), (0, 0, 0)])
def test_the_size_by_creator_and_by_option(
    tmp_path: Path, creator: bytes, geometry: tuple[int, int, int] | None
) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, 10 * MIB) == ""
    raw = bytearray(path.read_bytes())
    for start in (0, len(raw) - SECTOR):
        raw[start + 28 : start + 32] = creator
        raw[start + 48 : start + 56] = (10 * MIB).to_bytes(8, "big")
        if geometry is not None:
            raw[start + 56 : start + 58] = geometry[0].to_bytes(2, "big")
            raw[start + 58 : start + 60] = bytes(geometry[1:])
        sealed(raw, start)
    path.write_bytes(raw)
    for options in ({}, {"force_size_calc": "chs"}, {"force_size_calc": "current_size"}):
        assert we_open_here("vpc", path, **options) == qemu_opens("vpc", path, **options)


def test_other_words_for_the_size_are_refused_as_qemu_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, MIB) == ""
    for word in ("auto", "", "CHS"):
        options = {"force_size_calc": word}
        assert we_open_here("vpc", path, **options) == qemu_opens("vpc", path, **options)


def test_the_option_is_part_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, MIB) == ""
    words = f"driver=vpc,force_size_calc=chs,file.filename={path}"
    said = subprocess.run(
        ["qemu-img", "info", "--image-opts", words], capture_output=True, text=True, check=True
    )
    with opened("vpc", path, force_size_calc="chs") as node:
        assert said.stdout.splitlines()[0] == f"image: {node.filename}"


def put(offset: int, value: int, size: int) -> tuple[int, bytes]:
    return offset, value.to_bytes(size, "big")


#: What is done to a dynamic image, as (offset, bytes); the footer's checksum is made right again.
DAMAGES = {
    "no cookie": [put(0, 0, 1)],
    "type 2": [put(60, 2, 4)],
    "type 5": [put(60, 5, 4)],
    "version": [put(12, 0x20000, 4)],
    **{f"header at {n:x}": [put(16, n, 8)] for n in (0, 513, 1 << 40, (1 << 63) - 1, 1 << 63)},
    **{f"table at {n:x}": [put(528, n, 8)] for n in (0, 1, 513, 1 << 40, 1 << 63, (1 << 64) - 1)},
    **{f"block {n}": [put(544, n, 4)] for n in (0, 1, 256, 512, 513, 1 << 20, 3 << 20, 1 << 30)},
    **{
        f"entries {n}": [put(540, n, 4)]
        for n in (0, 1, 5, 6, 7, 128, 129, 0x1FFFFFFF, 0x20000000, 0x80000000, 0xFFFFFFFF)
    },
    **{f"block 0 at {n}": [put(1536, n, 4)] for n in (0, 1, 4, 5, 6, 0x7FFFFFFF, 0xFFFFFFFE)},
    "header cookie": [put(512, 0, 1)],
    "size": [put(28, int.from_bytes(b"win ", "big"), 4), put(48, 1 << 62, 8)],
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_images_in_qemus_words(tmp_path: Path, what: str) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, 10 * MIB) == ""
    raw = bytearray(path.read_bytes())
    for offset, data in DAMAGES[what]:
        raw[offset : offset + len(data)] = data
    sealed(raw, 0)
    path.write_bytes(raw)
    assert we_open_here("vpc", path) == qemu_opens("vpc", path)


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_cut_images_in_qemus_words(tmp_path: Path, subformat: str) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, 2 * MIB, subformat=subformat) == ""
    with opened("vpc", path, writable=True) as node:
        node.write(MIB, b"x")
    whole = path.read_bytes()
    cuts = (0, 1, 511, 512, 513, 1000, 1535, 1536, 1540, 1559, 2048, MIB, len(whole) - 513)
    for length in (*cuts, len(whole) - 512, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert we_open_here("vpc", path) == qemu_opens("vpc", path), length
    for more in (1, 511, 512, 513):
        path.write_bytes(whole + bytes(more))
        assert we_open_here("vpc", path) == qemu_opens("vpc", path), more


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_random_damage_in_qemus_words_or_with_its_bytes(
    tmp_path: Path, rng: random.Random, subformat: str
) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, 3 * MIB, subformat=subformat) == ""
    model = bytearray(len(content("vpc", path)))
    qemu_scribble("vpc", path, model, rng, 3)
    whole = path.read_bytes()
    for _ in range(60):
        raw = bytearray(whole)
        start = 0 if subformat == "dynamic" else len(raw) - SECTOR
        fields = [
            *(start + n for n in (0, 8, 12, 16, 23, 20, 28, 40, 48, 55, 56, 58, 59, 60, 63, 64))
        ]
        if subformat == "dynamic":
            fields += [512, 528, 534, 535, 536, 540, 542, 543, 544, 545, 546, 547, 1536, 1538, 1539]
        for _ in range(rng.randrange(1, 3)):
            raw[rng.choice(fields)] = rng.choice((0, 1, 2, 4, 255, 128, rng.randrange(256)))
        if rng.random() < 0.8:
            sealed(raw, start)
        if raw[start + 63] == 4 and raw[start + 60 : start + 63] == bytes(3):
            continue  # QEMU reads a differencing image without its parent
        path.write_bytes(raw)
        theirs = qemu_opens("vpc", path)
        assert we_open_here("vpc", path) == theirs, bytes(
            a ^ b for a, b in zip(raw, whole, strict=True)
        )
        if isinstance(theirs[0], int) and theirs[0] < 16 * MIB:
            assert content("vpc", path) == qemu_content("vpc", path)


def test_overlapping_blocks_read_as_qemu_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    assert qemu_create("vpc", path, 8 * MIB) == ""
    model = bytearray(len(content("vpc", path)))
    qemu_scribble("vpc", path, model, random.Random(1), 8)
    raw = bytearray(path.read_bytes())
    raw[1536:1540] = raw[1540:1544]
    raw[1544:1548] = (int.from_bytes(raw[1540:1544], "big") + 3).to_bytes(4, "big")
    path.write_bytes(raw)
    assert content("vpc", path) == qemu_content("vpc", path)
    with opened("vpc", path) as node:
        assert not node.check().clean
