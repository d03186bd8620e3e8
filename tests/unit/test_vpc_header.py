"""The footer, the header and the geometry of a VHD: fields, checksums, every byte flipped."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diskwright.drivers.formats.vpc import header as layout
from diskwright.drivers.formats.vpc.header import (
    DYNAMIC_BYTES,
    FOOTER_BYTES,
    MAX_GEOMETRY_SECTORS,
    MAX_SECTORS,
    SECTOR,
    DiskType,
    DynamicHeader,
    Footer,
    Locator,
    geometry_of,
    rounded_geometry,
)
from diskwright.errors import FormatError, IOFailure

SIZE = 10 << 20


def a_footer() -> Footer:
    footer = Footer.fresh(SIZE, rounded_geometry(SIZE // SECTOR))
    footer.unique_id, footer.timestamp = bytes(range(16)), 12345
    footer.sealed()
    return footer


def a_header() -> DynamicHeader:
    header = DynamicHeader.fresh(SIZE, 2 << 20)
    header.locators[1] = Locator(b"W2ru", 512, 20, 0, 1536)
    header.sealed()
    return header


def test_a_footer_is_what_it_was_packed_from() -> None:
    footer = a_footer()
    assert len(footer.pack()) == FOOTER_BYTES
    again = Footer.parse(footer.pack(), 0)
    assert all(getattr(again, name) == getattr(footer, name) for name in Footer.__slots__)


def test_a_header_is_what_it_was_packed_from() -> None:
    header = a_header()
    assert len(header.pack()) == DYNAMIC_BYTES
    again = DynamicHeader.parse(header.pack(), SIZE)
    assert again.pack() == header.pack()
    assert again.locators[1].code == b"W2ru"


def test_every_flipped_byte_of_a_footer_is_noticed() -> None:
    raw = a_footer().pack()
    for at in range(FOOTER_BYTES):
        flipped = bytearray(raw)
        flipped[at] ^= 0x5A
        with pytest.raises(FormatError) as caught:
            Footer.parse(bytes(flipped), 4096)
        assert caught.value.field == ("cookie" if at < 8 else "checksum")
        assert caught.value.offset is not None
        assert caught.value.offset >= 4096


def test_every_flipped_byte_of_a_header_raises_or_is_kept() -> None:
    raw = a_header().pack()
    for at in range(DYNAMIC_BYTES):
        flipped = bytearray(raw)
        flipped[at] ^= 0x5A
        field, made = parsed(bytes(flipped))
        if made is None:
            assert field in DynamicHeader.__slots__
        else:
            assert made.pack() == bytes(flipped)


def parsed(raw: bytes) -> tuple[str | None, DynamicHeader | None]:
    try:
        return None, DynamicHeader.parse(raw, SIZE)
    except FormatError as error:
        return error.field, None


@given(st.binary(max_size=600))
def test_any_bytes_are_a_footer_or_a_format_error(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Footer.parse(raw, 0)  # a checksum that fits by chance would be a wonder


@given(st.binary(min_size=28, max_size=DYNAMIC_BYTES), st.integers(0, 1 << 45))
def test_any_bytes_are_a_header_or_a_format_error(raw: bytes, size: int) -> None:
    try:
        made = DynamicHeader.parse(layout.DYNAMIC_COOKIE + raw, size)
    except FormatError:
        return
    assert made.max_table_entries * made.block_size >= size
    assert made.table_bytes <= layout.MAX_TABLE_BYTES


def test_a_checksum_is_the_complement_of_the_sum_of_the_others() -> None:
    raw = a_footer().pack()
    stored = int.from_bytes(raw[64:68], "big")
    assert (stored + sum(raw[:64]) + sum(raw[68:])) & 0xFFFFFFFF == 0xFFFFFFFF


@given(st.integers(0, MAX_GEOMETRY_SECTORS))
def test_a_geometry_fits_into_its_fields_and_into_the_disk(sectors: int) -> None:
    cylinders, heads, track = geometry_of(sectors)
    assert 0 <= cylinders <= 65535
    assert heads <= 16
    assert track <= 255
    assert cylinders * heads * track <= sectors


@given(st.integers(1, MAX_GEOMETRY_SECTORS))
@example(226084)  # a disk of the rounded size would get another geometry: as with QEMU
def test_a_rounded_geometry_has_room_and_is_of_a_disk_near_by(sectors: int) -> None:
    rounded = cylinders, heads, track = rounded_geometry(sectors)
    product = cylinders * heads * track
    assert sectors <= product < sectors + 16 * 255
    assert any(geometry_of(near) == rounded for near in range(sectors, product + 16 * 255))


def test_the_creator_says_which_size_counts() -> None:
    footer = a_footer()
    footer.current_size = SIZE
    cylinders, heads, track = rounded_geometry(SIZE // SECTOR)
    by_geometry = cylinders * heads * track * SECTOR
    assert by_geometry != SIZE
    for creator in (b"vpc ", b"qemu"):
        footer.creator = creator
        assert footer.size() == by_geometry
        assert footer.size("current_size") == SIZE
    for creator in (b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"vbox"):
        footer.creator = creator
        assert footer.size() == SIZE
        assert footer.size("chs") == by_geometry


def test_the_largest_geometry_never_counts() -> None:
    footer = a_footer()
    footer.current_size = 3 << 40 >> 1
    footer.cylinders, footer.heads, footer.track = layout.LARGEST_GEOMETRY
    assert footer.size() == footer.size("chs") == footer.current_size


def test_more_than_the_format_can_hold_is_refused() -> None:
    footer = a_footer()
    footer.creator, footer.current_size = b"win ", MAX_SECTORS * SECTOR + SECTOR - 1
    assert footer.size() == MAX_SECTORS * SECTOR
    footer.current_size += 1
    with pytest.raises(IOFailure) as caught:
        footer.size()
    assert caught.value.errno == 27


@pytest.mark.parametrize(
    ("block", "bitmap"),
    [(512, 0), (2048, 0), (4096, 512), (2 << 20, 512), (4 << 20, 1024), (1 << 31, 1 << 19)],
)
def test_a_bitmap_is_whole_sectors(block: int, bitmap: int) -> None:
    assert DynamicHeader.fresh(1 << 30, block).bitmap_bytes == bitmap


def test_only_fixed_refuses_the_footer_of_another_kind_before_its_checksum() -> None:
    raw = bytearray(a_footer().pack())
    raw[100] ^= 1
    with pytest.raises(FormatError) as caught:
        Footer.parse(bytes(raw), 0, only_fixed=True)
    assert caught.value.qemu == "invalid VPC image"
    footer = a_footer()
    footer.disk_type = DiskType.FIXED
    assert Footer.parse(footer.sealed(), 0, only_fixed=True).disk_type == DiskType.FIXED


@pytest.mark.parametrize(
    ("space", "length", "end"), [(1, 20, 1512), (512, 20, 1512), (0x10000, 32, 66536), (0, 9, 1009)]
)
def test_the_space_of_a_name_is_sectors_or_bytes(space: int, length: int, end: int) -> None:
    assert Locator(b"W2ru", space, length, 0, 1000).end == end
