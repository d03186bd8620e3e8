"""Writing VHD images: where blocks come to lie, where footers are, what `check` finds."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import pytest

from diskwright.block.info import Repair
from diskwright.block.opener import Opener, open_image
from diskwright.drivers.formats.vpc import tables
from diskwright.drivers.formats.vpc.driver import Vpc
from diskwright.drivers.formats.vpc.header import (
    FREE,
    SECTOR,
    DynamicHeader,
    Footer,
    checksum,
)
from diskwright.errors import DiskwrightError, FormatError, OptionError, UnsupportedError
from tests.unit.vm_images import content, create, opened, patched, scribble

MIB = 1 << 20
BLOCK = 2 * MIB
TABLE = 1536


def ends_with_its_footer(path: Path) -> bool:
    raw = path.read_bytes()
    return Footer.parse(raw[-SECTOR:], 0).pack() == raw[:SECTOR]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.vhd"
    create("vpc", path, 9 * MIB)
    return path


# --------------------------------------------------------------------------- growth and footers


def test_a_closed_image_ends_after_its_last_block(image: Path) -> None:
    empty = image.stat().st_size
    with opened("vpc", image, writable=True) as node:
        node.write(5 * MIB, b"x")
    assert image.stat().st_size == empty + BLOCK + SECTOR
    assert ends_with_its_footer(image)


def test_a_growing_image_ends_with_a_footer_at_every_flush(image: Path) -> None:
    with opened("vpc", image, writable=True) as node:
        for block in (3, 0, 1):
            node.write(block * BLOCK, b"x" * 5000)
            node.flush()
            assert ends_with_its_footer(image)


def test_reading_changes_nothing(image: Path) -> None:
    before = image.read_bytes()
    with opened("vpc", image, writable=True) as node:
        assert node.read(0, node.size) == bytes(node.size)
        node.flush()
    assert image.read_bytes() == before


@pytest.mark.parametrize("block_size", [4096, 65536, BLOCK, 8 * MIB])
def test_footers_of_growth_never_show_in_blocks(tmp_path: Path, block_size: int) -> None:
    """A block that comes to lie where a footer was reads as what was written."""
    path = tmp_path / "disk.vhd"
    create("vpc", path, 12 * block_size if block_size > MIB else 6 * MIB, block_size=block_size)
    with opened("vpc", path, writable=True) as node:
        model = bytearray(node.size)
        order = list(range(0, node.size, block_size))
        random.Random(block_size).shuffle(order)
        for offset in order[:200]:
            node.write(offset + 700, b"in use")
            model[offset + 700 : offset + 706] = b"in use"
        assert node.read(0, node.size) == model
    assert content("vpc", path) == model
    assert ends_with_its_footer(path)


def test_an_image_without_its_last_footer_gets_it_back(image: Path) -> None:
    patched(image, -SECTOR, bytes(SECTOR))
    with opened("vpc", image, writable=True) as node:
        assert not node.check().clean
        node.write(0, b"x")
    assert ends_with_its_footer(image)
    with opened("vpc", image) as node:
        assert node.check().clean


@pytest.mark.parametrize("options", [{}, {"block_size": 4096}, {"force_size": True}])
def test_random_writes_against_a_model(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, 7 * MIB + 512, **options)
    model = bytearray()
    for _ in range(3):
        with opened("vpc", path, writable=True) as node:
            model = model or bytearray(node.size)
            scribble(node, model, rng, 12)
            assert node.read(0, node.size) == model
        with opened("vpc", path) as node:
            assert node.read(0, node.size) == model
            found = node.check()
            assert found.clean
            assert found.image_end_offset == path.stat().st_size


def test_zeroing_what_is_free_allocates_nothing(image: Path) -> None:
    before = image.stat().st_size
    with opened("vpc", image, writable=True) as node:
        node.write_zeroes(0, node.size, fast=True)
        assert all(extent.kind == 1 for extent in node.extents(0, node.size))
        node.write(0, b"x")
        node.write_zeroes(0, node.size)
        assert node.read(0, node.size) == bytes(node.size)
    assert image.stat().st_size == before + BLOCK + SECTOR


def test_a_write_fills_the_bitmap_of_its_block(image: Path) -> None:
    with opened("vpc", image, writable=True) as node:
        node.write(BLOCK, b"x")
    raw = image.read_bytes()
    word = int.from_bytes(raw[TABLE + 4 : TABLE + 8], "big")
    assert raw[word * SECTOR : word * SECTOR + SECTOR] == b"\xff" * SECTOR
    assert int.from_bytes(raw[TABLE : TABLE + 4], "big") == FREE


def test_blocks_too_small_for_a_bitmap_have_none(image: Path) -> None:
    """QEMU has it so; nobody else makes them."""
    raw = bytearray(image.read_bytes())
    header = DynamicHeader.parse(bytes(raw[512:1536]), 0)
    header.block_size, header.max_table_entries = 1024, 9300
    footer, table = bytes(raw[-SECTOR:]), b"\xff" * (-(-9300 * 4 // SECTOR) * SECTOR)
    image.write_bytes(bytes(raw[:512]) + header.sealed() + table + footer)
    with opened("vpc", image, writable=True) as node:
        node.write(2000, b"across" * 100)
        model = node.read(0, node.size)
    assert model[1990:2606] == bytes(10) + b"across" * 100 + bytes(6)
    assert content("vpc", image) == model
    assert image.stat().st_size == 1536 + len(table) + 2 * 1024 + SECTOR


# ------------------------------------------------------------------------------------------ fixed


def test_a_fixed_image_is_its_content_and_a_footer(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, 3 * MIB, subformat="fixed", force_size=True)
    with opened("vpc", path, writable=True) as node:
        node.write(MIB - 3, b"middle")
        node.write(node.size - 4, b"last")
        node.write_zeroes(MIB, 3)
    raw = path.read_bytes()
    assert len(raw) == 3 * MIB + SECTOR
    assert raw[MIB - 3 : MIB + 3] == b"mid\0\0\0"
    assert raw[3 * MIB - 4 : 3 * MIB] == b"last"
    assert Footer.parse(raw[-SECTOR:], 0, only_fixed=True).size() == 3 * MIB


def test_a_fixed_image_is_probed_as_raw_and_opened_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, MIB, subformat="fixed", force_size=True)
    with open_image(Opener(), str(path)) as node:
        assert (node.driver, node.size) == ("raw", MIB + SECTOR)
    with open_image(Opener(), str(path), format="vpc") as node:
        assert (node.driver, node.size) == ("vpc", MIB)


def test_a_fixed_image_that_was_cut_is_read_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create("vpc", path, MIB, subformat="fixed", force_size=True)
    raw = path.read_bytes()
    path.write_bytes(raw[512 * 1024 :])
    with opened("vpc", path) as node:
        assert node.size == MIB
        assert node.read(MIB - 16, 16) == bytes(16)
    before = path.read_bytes()
    with opened("vpc", path, writable=True) as node, pytest.raises(FormatError):
        node.write(0, b"x")
    assert path.read_bytes() == before


def test_a_dynamic_image_that_says_fixed_is_not_written(image: Path) -> None:
    """QEMU reads such a file's own bytes; writing them would destroy the header."""
    footer = Footer.parse(image.read_bytes()[:SECTOR], 0)
    footer.disk_type = 2
    patched(image, 0, footer.sealed())
    before = image.read_bytes()
    with opened("vpc", image, writable=True) as node:
        assert node.read(0, 8) == b"conectix"
        with pytest.raises(FormatError):
            node.write(0, b"x")
    assert image.read_bytes() == before


# ------------------------------------------------------------------------------ check and repair


def test_check_counts_what_overlaps(image: Path) -> None:
    with opened("vpc", image, writable=True) as node:
        node.write(0, b"a")
        node.write(BLOCK, b"b")
    raw = image.read_bytes()
    first = int.from_bytes(raw[TABLE : TABLE + 4], "big")
    lines: list[str] = []
    patched(image, TABLE + 4, (first + 1).to_bytes(4, "big"))
    with opened("vpc", image) as node:
        assert node.check(report=lines.append).corruptions == 1
    assert "overlaps the block at sector" in lines[0]
    patched(image, TABLE + 4, (2).to_bytes(4, "big"))
    lines.clear()
    with opened("vpc", image) as node:
        # the block in the headers ends after the other one begins
        assert node.check(report=lines.append).corruptions == 2
    assert "overlaps the headers" in lines[0]


def test_check_repairs_checksum_and_footer(image: Path) -> None:
    patched(image, 512 + 36, b"\0\0\0\0")
    patched(image, -SECTOR + 300, b"x")
    with opened("vpc", image) as node:
        assert node.check().corruptions == 2
    with opened("vpc", image, writable=True) as node:
        mended = node.check(Repair.ALL)
        assert (mended.corruptions, mended.corruptions_fixed) == (0, 2)
    with opened("vpc", image) as node:
        assert node.check().clean
    assert ends_with_its_footer(image)


def test_check_is_said_to_be_beyond_qemu() -> None:
    assert Vpc.check_beyond_qemu


def test_check_of_a_table_full_of_one_block_stays_small(tmp_path: Path) -> None:
    """A sparse file can have a table of half a billion words that all name sector 0."""
    path = tmp_path / "disk.vhd"
    create("vpc", path, 64 << 30)
    header = DynamicHeader.parse(path.read_bytes()[512:1536], 0)
    header.max_table_entries, header.table_offset = 1 << 22, 4096
    with path.open("r+b") as file:
        file.seek(512)
        file.write(header.sealed())
        file.truncate(TABLE)
        file.truncate(32 * MIB)
    with opened("vpc", path) as node:
        found = node.check()
    assert not found.clean
    assert found.allocated_clusters < 1 << 20


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 2048},
        {"block_size": 3 << 20},
        {"block_size": 1 << 32},
        {"subformat": "fixed", "block_size": MIB},
    ],
)
def test_block_sizes_that_cannot_be(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        create("vpc", tmp_path / "disk.vhd", MIB, **options)
    assert caught.value.field == "block_size"
    assert not list(tmp_path.iterdir())


def test_a_table_that_overlaps_the_header_is_not_written(image: Path) -> None:
    raw = bytearray(image.read_bytes())
    raw[1024:1536] = b"\xff" * 512  # inside of the header
    header = DynamicHeader.parse(bytes(raw[512:1536]), 0)
    header.table_offset = 1024
    image.write_bytes(bytes(raw[:512]) + header.pack() + bytes(raw[1536:]))
    before = image.read_bytes()
    with opened("vpc", image, writable=True) as node:
        assert node.read(0, 512) == bytes(512)
        with pytest.raises(FormatError, match="overlap"):
            node.write(0, b"x")
    assert image.read_bytes() == before


def test_there_is_no_resize(image: Path) -> None:
    with opened("vpc", image, writable=True) as node:
        assert not node.can_resize
        with pytest.raises(UnsupportedError) as caught:
            node.truncate(20 * MIB)
    assert caught.value.qemu_message == "Image format driver does not support resize"


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_lies_end_in_an_error_of_ours_and_bounded_files(
    tmp_path: Path, rng: random.Random, kind: str
) -> None:
    """Flip, cut and overwrite; then read, check, write. The file may not run away."""
    made = tmp_path / "made.vhd"
    create("vpc", made, 3 * MIB, subformat=kind)
    with opened("vpc", made, writable=True) as node:
        node.write(MIB, b"x" * 100_000)
    whole = made.read_bytes()
    path = tmp_path / "lie.vhd"
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(2048), len(raw) - 1 - rng.randrange(512)))
            raw[at] = rng.choice((0, 1, 255, 128, rng.randrange(256)))
        if rng.random() < 0.3:
            del raw[rng.randrange(len(raw)) :]
        for at in (0, len(raw) - SECTOR) if rng.random() < 0.7 else ():
            if raw[at : at + 8] == b"conectix":
                raw[at + 64 : at + 68] = checksum(raw[at : at + SECTOR], 64).to_bytes(4, "big")
        path.write_bytes(raw)
        try:
            with opened("vpc", path, writable=True) as node:
                node.read(0, min(node.size, 4 * MIB))
                node.check()
                node.write(min(max(node.size - 1, 0), MIB + 77), b"y"[: node.size])
        except DiskwrightError:
            pass
        assert path.stat().st_size <= len(raw) + (3 << 31)


# ------------------------------------------------------------------------------- several threads


def test_threads_in_units_that_are_here_in_part(tmp_path: Path) -> None:
    """Writers of neighbouring sectors complete units around each other; nothing gets lost."""
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    create("vpc", base, 2 * MIB)
    create("vpc", top, 0, backing="base.vhd", block_size=65536)
    rng = random.Random(7)
    with opened("vpc", top, writable=True) as node:
        size = node.size
        node.write(0, bytes(range(1, 256)) * (size // 255))
        model = bytearray(node.read(0, size))
    raw = bytearray(top.read_bytes())
    header = DynamicHeader.parse(bytes(raw[512:1536]), size)
    for sector in range(size // SECTOR):
        at = header.table_offset + sector // 128 * 4
        bitmap = int.from_bytes(raw[at : at + 4], "big") * SECTOR
        if rng.random() < 0.4:
            raw[bitmap + sector % 128 // 8] &= ~(0x80 >> sector % 8)
            model[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
    top.write_bytes(raw)
    wrong: list[int] = []

    def work(node: Vpc, number: int) -> None:
        mine = random.Random(number)
        for _ in range(400):
            offset = (mine.randrange(size // SECTOR // 4) * 4 + number) * SECTOR
            offset += mine.randrange(200)
            data = mine.randbytes(300)
            node.write(offset, data)
            model[offset : offset + 300] = data
            if node.read(offset, 300) != data:
                wrong.append(offset)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with opened("vpc", top, writable=True) as node:
            assert node.read(0, size) == model
            threads = [threading.Thread(target=work, args=(node, n)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert node.read(0, size) == model
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert content("vpc", top) == model


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 8), (3, 11), (5, 4096), (4095, 4096)])
def test_bits_are_counted_from_the_top(low: int, high: int) -> None:
    from array import array

    items = array("B", bytes(512))
    tables._set(items, low, high)
    assert tables._zeroes(items, 0, 4096) == low
    assert tables._ones(items, low, 4096) == high - low
    assert items[low // 8] & 0x80 >> low % 8
    tables._clear(items, low, high)
    assert items.tobytes() == bytes(512)
