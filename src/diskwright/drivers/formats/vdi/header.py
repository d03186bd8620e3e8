"""The header of a VDI image: one sector and a half of fields, little-endian.

A VDI file is the header, the block map (a 32-bit word for each block of the disk) and the
blocks. A word is the number of a block in the data area, FREE (nothing here: zeroes, or the
parent of a differencing image) or ZERO (zeroes, whatever a parent has).

Source: VirtualBox, "VDICore.h" names of version 1.1, and images made by VirtualBox and QEMU.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from diskwright.block.record import Record
from diskwright.errors import FormatError

HEADER_BYTES = 512
SIGNATURE = 0xBEDA107F
SIGNATURE_OFFSET = 0x40
VERSION = 0x00010001
SECTOR = 512

#: What QEMU reads and both programs write; other powers of two are the user's choice.
DEFAULT_BLOCK_SIZE = 1 << 20
MIN_BLOCK_SIZE = 512
MAX_BLOCK_SIZE = 1 << 31

#: A map of this many blocks is 2 GiB; QEMU refuses larger ones too.
MAX_BLOCKS = 0x1FFFFF80
MAX_SIZE = MAX_BLOCKS << 20

FREE = 0xFFFFFFFF
ZERO = 0xFFFFFFFE

#: The number of the word `blocks_allocated` among the header's words.
COUNT_WORD = 0x184 // 4

NO_UUID = bytes(16)
#: What QEMU writes; readers show it, nothing depends on it.
TEXT = b"<<< QEMU VM Virtual Disk Image >>>\n"


class ImageType(IntEnum):
    """What an image is; QEMU looks at STATIC only."""

    DYNAMIC = 1
    STATIC = 2
    UNDO = 3
    DIFFERENCING = 4


_FORMATS = (
    *("64s", "I", "I", "I", "I", "I", "256s", "I", "I", "I", "I", "I", "I", "I"),
    *("Q", "I", "I", "I", "I", "16s", "16s", "16s", "16s", "56s"),
)
_LAYOUT = struct.Struct("<" + "".join(_FORMATS))


class Header(Record):
    """The fields, in the order of the file; `tail` is what follows them in the sector."""

    __slots__ = (
        "text",
        "signature",
        "version",
        "header_size",
        "image_type",
        "flags",
        "description",
        "map_offset",
        "data_offset",
        "cylinders",
        "heads",
        "sectors",
        "sector_size",
        "unused",
        "disk_size",
        "block_size",
        "block_extra",
        "blocks",
        "blocks_allocated",
        "uuid_image",
        "uuid_modified",
        "uuid_link",
        "uuid_parent_modified",
        "tail",
    )

    text: bytes
    signature: int
    version: int
    header_size: int
    image_type: int
    flags: int
    description: bytes
    map_offset: int
    data_offset: int
    cylinders: int
    heads: int
    sectors: int
    sector_size: int
    unused: int
    disk_size: int
    block_size: int
    block_extra: int
    blocks: int
    blocks_allocated: int
    uuid_image: bytes
    uuid_modified: bytes
    uuid_link: bytes
    uuid_parent_modified: bytes
    tail: bytes

    def __init__(self, values: tuple[int | bytes, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)

    @classmethod
    def fresh(cls, size: int, block_size: int) -> Header:
        """The header of a new dynamic image without blocks; `size` is whole sectors."""
        blocks = -(-size // block_size)
        map_bytes = -(-blocks * 4 // SECTOR) * SECTOR
        made = cls(_LAYOUT.unpack(bytes(HEADER_BYTES)))
        made.text = TEXT.ljust(64, b"\0")
        made.signature = SIGNATURE
        made.version = VERSION
        made.header_size = 0x180
        made.image_type = ImageType.DYNAMIC
        made.map_offset = HEADER_BYTES
        made.data_offset = HEADER_BYTES + map_bytes
        made.sector_size = SECTOR
        made.disk_size = size
        made.block_size = block_size
        made.blocks = blocks
        return made

    @classmethod
    def parse(cls, buffer: bytes) -> Header:
        """The header of an image that begins with `buffer`; what is missing reads as zero.

        Raises:
            FormatError: it is not VDI, or not one that can be read.
        """
        made = cls(_LAYOUT.unpack(buffer[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")))
        made._check_kind()
        made._check_layout()
        made._check_parent()
        if made.blocks > MAX_BLOCKS:
            raise made._unsupported(f"too many blocks {made.blocks}, max is {MAX_BLOCKS}", "blocks")
        return made

    def _check_kind(self) -> None:
        if self.disk_size > MAX_SIZE:
            raise size_error(self.disk_size)
        if self.signature != SIGNATURE:
            raise FormatError(
                f"Image not in VDI format (bad signature {self.signature:08x})",
                field="signature",
                value=self.signature,
                offset=SIGNATURE_OFFSET,
                expected=SIGNATURE,
            )
        if self.version != VERSION:
            number = f"{self.version >> 16}.{self.version & 0xFFFF}"
            raise self._unsupported(f"version {number}", "version")

    def _check_layout(self) -> None:
        if self.map_offset % SECTOR:
            reason = f"unaligned block map offset 0x{self.map_offset:x}"
            raise self._unsupported(reason, "map_offset")
        if self.data_offset % SECTOR:
            reason = f"unaligned data offset 0x{self.data_offset:x}"
            raise self._unsupported(reason, "data_offset")
        if self.sector_size != SECTOR:
            reason = f"sector size {self.sector_size} is not {SECTOR}"
            raise self._unsupported(reason, "sector_size")
        block = self.block_size
        if block & (block - 1) or not MIN_BLOCK_SIZE <= block <= MAX_BLOCK_SIZE:
            raise self._unsupported(f"block size {block} is not {DEFAULT_BLOCK_SIZE}", "block_size")
        extra = self.block_extra
        if extra & (extra - 1) or extra % SECTOR or extra > block:
            raise self._unsupported(f"{extra} extra bytes before each block", "block_extra")
        if self.size > self.blocks * block:
            room = self.blocks * block
            raise self._unsupported(
                f"disk size {self.size}, image bitmap has room for {room}", "disk_size"
            )

    def _check_parent(self) -> None:
        may_have_parent = self.image_type in (ImageType.UNDO, ImageType.DIFFERENCING)
        if self.uuid_link != NO_UUID and not may_have_parent:
            raise self._unsupported("non-NULL link UUID", "uuid_link")
        if self.uuid_parent_modified != NO_UUID and self.uuid_link == NO_UUID:
            raise self._unsupported("non-NULL parent UUID", "uuid_parent_modified")

    def _unsupported(self, reason: str, field: str) -> FormatError:
        before = self.__slots__.index(field)
        return FormatError(
            f"unsupported VDI image ({reason})",
            field=field,
            value=getattr(self, field),
            offset=struct.calcsize("<" + "".join(_FORMATS[:before])),
        )

    def pack(self) -> bytes:
        """The first sector of the image; the inverse of `parse`."""
        return _LAYOUT.pack(*(getattr(self, name) for name in self.__slots__))

    @property
    def size(self) -> int:
        """Bytes of the disk: whole sectors, as QEMU rounds."""
        return -(-self.disk_size // SECTOR) * SECTOR

    @property
    def is_differencing(self) -> bool:
        """Whether FREE blocks show a parent."""
        return self.uuid_link != NO_UUID

    @property
    def is_static(self) -> bool:
        """Whether all blocks were there from the beginning."""
        return self.image_type == ImageType.STATIC

    @property
    def block_stride(self) -> int:
        """Bytes from one block of the data area to the next."""
        return self.block_size + self.block_extra

    @property
    def map_end(self) -> int:
        """The first byte after the block map."""
        return self.map_offset + self.blocks * 4


def size_error(size: int) -> FormatError:
    """The error for a disk that no VDI image can hold."""
    return FormatError(
        f"Unsupported VDI image size (size is 0x{size:x}, max supported is 0x{MAX_SIZE:x})",
        field="disk_size",
        value=size,
        offset=0x170,
        expected=MAX_SIZE,
    )


def uuid_text(uuid: bytes) -> str:
    """An identifier as VirtualBox shows it: the first three groups are little-endian."""
    groups = (uuid[3::-1], uuid[5:3:-1], uuid[7:5:-1], uuid[8:10], uuid[10:])
    return "-".join(group.hex() for group in groups)
