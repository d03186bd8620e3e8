"""The header of a VDI image: fields there and back, every byte flipped, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.drivers.formats.vdi import header as layout
from diskwright.drivers.formats.vdi.header import HEADER_BYTES, Header, ImageType, uuid_text
from diskwright.errors import FormatError

SIZE = 10 << 20


def a_header() -> Header:
    header = Header.fresh(SIZE, layout.DEFAULT_BLOCK_SIZE)
    header.uuid_image, header.uuid_modified = bytes(range(16)), bytes(range(16, 32))
    return header


def parsed(raw: bytes) -> tuple[str | None, Header | None]:
    try:
        return None, Header.parse(raw)
    except FormatError as error:
        return error.field, None


def test_a_header_is_what_it_was_packed_from() -> None:
    header = a_header()
    assert len(header.pack()) == HEADER_BYTES
    again = Header.parse(header.pack())
    assert all(getattr(again, name) == getattr(header, name) for name in Header.__slots__)


def test_every_flipped_byte_raises_or_is_kept() -> None:
    raw = a_header().pack()
    refused = set()
    for at in range(HEADER_BYTES):
        for bits in (0x01, 0x80, 0xFF):
            flipped = bytearray(raw)
            flipped[at] ^= bits
            field, made = parsed(bytes(flipped))
            if made is None:
                assert field in Header.__slots__
                refused.add(field)
            else:
                assert made.pack() == bytes(flipped)
                assert made.size <= made.blocks * made.block_size
    assert {"signature", "version", "map_offset", "data_offset", "sector_size"} < refused
    assert {"block_size", "block_extra", "disk_size", "uuid_link"} < refused


@given(st.binary(max_size=HEADER_BYTES - 72))
def test_any_bytes_are_a_header_or_a_format_error(tail: bytes) -> None:
    start = (
        bytes(64) + layout.SIGNATURE.to_bytes(4, "little") + layout.VERSION.to_bytes(4, "little")
    )
    field, made = parsed(start + tail)
    if made is None:
        assert field in Header.__slots__
    else:
        assert made.blocks <= layout.MAX_BLOCKS


@pytest.mark.parametrize(
    ("extra", "fits"),
    [(0, True), (512, True), (4096, True), (100, False), (1536, False), (1 << 31, False)],
)
def test_extra_bytes_before_blocks_are_whole_sectors(extra: int, fits: bool) -> None:
    header = a_header()
    header.block_extra = extra
    field, made = parsed(header.pack())
    assert (made is not None) == fits
    assert field in (None, "block_extra")


def test_a_link_makes_a_differencing_image_and_no_other() -> None:
    header = a_header()
    header.uuid_link = b"\x11" * 16
    assert parsed(header.pack())[0] == "uuid_link"
    header.image_type = ImageType.DIFFERENCING
    assert Header.parse(header.pack()).is_differencing
    header.uuid_link, header.uuid_parent_modified = bytes(16), b"\x22" * 16
    assert parsed(header.pack())[0] == "uuid_parent_modified"


def test_an_identifier_is_shown_as_virtualbox_shows_it() -> None:
    assert uuid_text(bytes(range(16))) == "03020100-0504-0706-0809-0a0b0c0d0e0f"


@pytest.mark.parametrize(("bytes_", "sectors"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_the_size_is_whole_sectors(bytes_: int, sectors: int) -> None:
    header = a_header()
    header.disk_size = bytes_
    assert Header.parse(header.pack()).size == sectors
