"""The footer, the dynamic disk header and the geometry of a VHD file, all big-endian.

A fixed VHD is the disk's bytes and a footer. Dynamic and differencing ones begin with a copy
of the footer and the dynamic disk header, which says where the block allocation table is.

Source: Microsoft, Virtual Hard Disk Image Format Specification 1.0 ("Hard Disk Footer Format",
"Dynamic Disk Header Format", "Appendix: CHS Calculation"); which size counts for which
creator, and the limits, as qemu-img 10.0.2 shows them.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from diskwright.block.record import Record
from diskwright.errors import FormatError, IOFailure

SECTOR = 512
FOOTER_BYTES = 512
DYNAMIC_BYTES = 1024
FOOTER_COOKIE = b"conectix"
DYNAMIC_COOKIE = b"cxsparse"
VERSION = 0x00010000
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
NO_UUID = bytes(16)

#: A word of the block allocation table for a block that is not there.
FREE = 0xFFFFFFFF

DEFAULT_BLOCK_SIZE = 2 << 20
MIN_BLOCK_SIZE = 512
#: Below this QEMU reads and writes blocks without a bitmap, and libvhdi reads none.
MIN_BLOCK_WITH_BITMAP = 4096

#: The largest geometry: 127 GiB and a bit.
MAX_CYLINDERS, MAX_HEADS, MAX_TRACK = 65535, 16, 255
LARGEST_GEOMETRY = (MAX_CYLINDERS, MAX_HEADS, MAX_TRACK)
MAX_GEOMETRY_SECTORS = MAX_CYLINDERS * MAX_HEADS * MAX_TRACK
#: 2040 GiB: sector numbers have 32 bits, and blocks need some of them.
MAX_SECTORS = 0xFF000000

#: Words of the table that QEMU reads: as many as fit its longest request.
MAX_TABLE_ENTRIES = 0x1FFFFFFF
MAX_TABLE_BYTES = 0x7FFFFE00

#: Creators whose images have the size of their geometry, and everybody else's the size written.
GEOMETRY_CREATORS = (b"vpc ", b"qemu")
CREATOR = b"qemu"
#: The creator that tells every QEMU to believe the size written.
CREATOR_FORCED = b"qem2"

#: 1 January 2000, UTC, in seconds since 1970: where VHD time begins.
EPOCH = 946684800


class DiskType(IntEnum):
    """What follows the footer's copy, if there is one."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_TYPE_OFFSET = 60
_CHECKSUM_OFFSET = 64
_DYNAMIC = struct.Struct(">8sQQIIII16sII512s192s256s")
DYNAMIC_CHECKSUM_OFFSET = 36
_LOCATOR = struct.Struct(">4sIIIQ")
LOCATORS = 8


def checksum(data: bytes, at: int) -> int:
    """One's complement of the sum of all bytes but the checksum's own four at `at`."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


class Footer(Record):
    """The hard disk footer, fields in the order of the file."""

    __slots__ = (
        "cookie",
        "features",
        "version",
        "data_offset",
        "timestamp",
        "creator",
        "creator_version",
        "creator_host",
        "original_size",
        "current_size",
        "cylinders",
        "heads",
        "track",
        "disk_type",
        "checksum",
        "unique_id",
        "saved_state",
        "reserved",
    )

    cookie: bytes
    features: int
    version: int
    data_offset: int
    timestamp: int
    creator: bytes
    creator_version: int
    creator_host: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    track: int
    disk_type: int
    checksum: int
    unique_id: bytes
    saved_state: int
    reserved: bytes

    def __init__(self, values: tuple[int | bytes, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)

    @classmethod
    def fresh(cls, size: int, geometry: tuple[int, int, int]) -> Footer:
        """The footer of a new dynamic image of `size` bytes; the caller says when and who."""
        made = cls(_FOOTER.unpack(bytes(FOOTER_BYTES)))
        made.cookie = FOOTER_COOKIE
        made.features = 2  # a reserved bit that is always set
        made.version = VERSION
        made.data_offset = FOOTER_BYTES
        made.creator = CREATOR
        made.creator_version = 0x00050003
        made.creator_host = b"Wi2k"
        made.original_size = made.current_size = size
        made.cylinders, made.heads, made.track = geometry
        made.disk_type = DiskType.DYNAMIC
        return made

    @classmethod
    def parse(cls, buffer: bytes, offset: int, *, only_fixed: bool = False) -> Footer:
        """The footer in `buffer`, which lies at `offset` of the file.

        Args:
            buffer, offset: where it is.
            only_fixed: it must be that of a fixed image.

        Raises:
            FormatError: it is none, or its checksum is wrong.
        """
        made = cls(_FOOTER.unpack(buffer[:FOOTER_BYTES].ljust(FOOTER_BYTES, b"\0")))
        if made.cookie != FOOTER_COOKIE:
            raise FormatError(
                "Not a VHD: it has no footer where one should be",
                field="cookie",
                value=made.cookie,
                offset=offset,
                expected=FOOTER_COOKIE,
                qemu="invalid VPC image",
            )
        if only_fixed and made.disk_type != DiskType.FIXED:
            raise FormatError(
                "A VHD that is not fixed must begin with a copy of its footer",
                field="disk_type",
                value=made.disk_type,
                offset=offset + _TYPE_OFFSET,
                expected=int(DiskType.FIXED),
                qemu="invalid VPC image",
            )
        right = checksum(buffer[:FOOTER_BYTES], _CHECKSUM_OFFSET)
        if made.checksum != right:
            raise FormatError(
                "The checksum of the VHD footer is wrong",
                field="checksum",
                value=made.checksum,
                offset=offset + _CHECKSUM_OFFSET,
                expected=right,
                qemu="Incorrect header checksum",
            )
        return made

    def pack(self) -> bytes:
        """The footer's 512 bytes, with the checksum as it is in the field."""
        return _FOOTER.pack(*(getattr(self, name) for name in self.__slots__))

    def sealed(self) -> bytes:
        """Set the checksum, and pack."""
        self.checksum = checksum(self.pack(), _CHECKSUM_OFFSET)
        return self.pack()

    @property
    def has_largest_geometry(self) -> bool:
        """Whether the geometry is the one that means "larger than a geometry can say"."""
        return (self.cylinders, self.heads, self.track) == LARGEST_GEOMETRY

    def size(self, rule: str = "") -> int:
        """Bytes of the disk.

        Args:
            rule: "chs" or "current_size"; without one it depends on the creator. The largest
                geometry never counts.

        Raises:
            IOFailure: more than the format can hold.
        """
        by_geometry = rule == "chs" if rule else self.creator in GEOMETRY_CREATORS
        if by_geometry and not self.has_largest_geometry:
            sectors = self.cylinders * self.heads * self.track
        else:
            sectors = self.current_size // SECTOR
        if sectors > MAX_SECTORS:
            raise IOFailure(
                f"A VHD has at most {MAX_SECTORS * SECTOR} bytes, this one says {sectors * SECTOR}",
                errno=27,
            )
        return sectors * SECTOR


class Locator(Record):
    """Where a parent's name for one platform lies, and how long it is."""

    __slots__ = ("code", "space", "length", "reserved", "offset")

    def __init__(
        self, code: bytes, space: int, length: int, reserved: int = 0, offset: int = 0
    ) -> None:
        self.code = code
        self.space = space
        self.length = length
        self.reserved = reserved
        self.offset = offset

    @property
    def end(self) -> int:
        """The first byte after its space.

        The specification counts that in sectors, images of Windows in bytes.
        """
        space = self.space if self.space >= SECTOR else self.space * SECTOR
        return self.offset + max(space, self.length)


class DynamicHeader(Record):
    """The dynamic disk header, fields in the order of the file."""

    __slots__ = (
        "cookie",
        "data_offset",
        "table_offset",
        "version",
        "max_table_entries",
        "block_size",
        "checksum",
        "parent_id",
        "parent_timestamp",
        "reserved",
        "parent_name",
        "locators",
        "tail",
    )

    cookie: bytes
    data_offset: int
    table_offset: int
    version: int
    max_table_entries: int
    block_size: int
    checksum: int
    parent_id: bytes
    parent_timestamp: int
    reserved: int
    parent_name: bytes
    locators: list[Locator]
    tail: bytes

    def __init__(self, values: tuple[object, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)

    @classmethod
    def _unpack(cls, buffer: bytes) -> DynamicHeader:
        values: list[object] = list(_DYNAMIC.unpack(buffer))
        raw = values[11]
        assert isinstance(raw, bytes)
        values[11] = [Locator(*fields) for fields in _LOCATOR.iter_unpack(raw)]
        return cls(tuple(values))

    @classmethod
    def fresh(cls, size: int, block_size: int) -> DynamicHeader:
        """The header of a new image of `size` bytes without a parent."""
        made = cls._unpack(bytes(DYNAMIC_BYTES))
        made.cookie = DYNAMIC_COOKIE
        made.data_offset = NO_OFFSET
        made.table_offset = FOOTER_BYTES + DYNAMIC_BYTES
        made.version = VERSION
        made.max_table_entries = -(-size // block_size)
        made.block_size = block_size
        return made

    @classmethod
    def parse(cls, buffer: bytes, size: int) -> DynamicHeader:
        """The header of a disk of `size` bytes.

        Its checksum is not looked at, as QEMU does not either.

        Raises:
            FormatError: it is none, or its table cannot be read.
        """
        made = cls._unpack(buffer[:DYNAMIC_BYTES].ljust(DYNAMIC_BYTES, b"\0"))
        if made.cookie != DYNAMIC_COOKIE:
            raise made._error("Invalid header magic", "cookie", DYNAMIC_COOKIE)
        block = made.block_size
        if block & (block - 1) or block < MIN_BLOCK_SIZE:
            raise made._error(f"Invalid block size {block}", "block_size", "a power of two")
        if made.max_table_entries > MAX_TABLE_ENTRIES:
            entries = made.max_table_entries
            shown = entries - (1 << 32) if entries >> 31 else entries
            raise made._error(
                f"Max Table Entries too large ({shown})", "max_table_entries", MAX_TABLE_ENTRIES
            )
        if made.max_table_entries * block < size:
            raise made._error("Page table too small", "max_table_entries", -(-size // block))
        if (
            made.table_bytes > MAX_TABLE_BYTES
            or made.table_offset + made.table_bytes > (1 << 63) - SECTOR
        ):
            raise made._error("Error reading pagetable", "table_offset", MAX_TABLE_BYTES)
        return made

    def _error(self, message: str, field: str, expected: object) -> FormatError:
        return FormatError(message, field=field, value=getattr(self, field), expected=expected)

    def pack(self) -> bytes:
        """The header's 1024 bytes, with the checksum as it is in the field."""
        values = [getattr(self, name) for name in self.__slots__]
        values[11] = b"".join(
            _LOCATOR.pack(entry.code, entry.space, entry.length, entry.reserved, entry.offset)
            for entry in self.locators
        )
        return _DYNAMIC.pack(*values)

    def sealed(self) -> bytes:
        """Set the checksum, and pack."""
        self.checksum = checksum(self.pack(), DYNAMIC_CHECKSUM_OFFSET)
        return self.pack()

    @property
    def table_bytes(self) -> int:
        """Bytes of the block allocation table."""
        return self.max_table_entries * 4

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the sector bitmap before each block: whole sectors.

        Smaller blocks than MIN_BLOCK_WITH_BITMAP have none, as QEMU has it.
        """
        return -(-(self.block_size // (8 * SECTOR)) // SECTOR) * SECTOR


def geometry_of(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track for a disk of that many sectors.

    Source: the specification's appendix; the product may be less than `sectors`.
    """
    sectors = min(sectors, MAX_GEOMETRY_SECTORS)
    if sectors >= 65535 * 16 * 63:
        track, heads = 255, 16
        rows = sectors // track
        return rows // heads, heads, track
    track = 17
    rows = sectors // track
    heads = max((rows + 1023) // 1024, 4)
    if rows >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        rows = sectors // track
    if rows >= heads * 1024:
        track, heads = 63, 16
        rows = sectors // track
    return rows // heads, heads, track


def rounded_geometry(sectors: int) -> tuple[int, int, int]:
    """The geometry of the smallest disk with one that has at least that many sectors.

    Meant for at most MAX_GEOMETRY_SECTORS.
    """
    if not sectors:
        return 0, 0, 0
    candidate = sectors
    while True:
        cylinders, heads, track = geometry_of(candidate)
        if cylinders * heads * track >= sectors or candidate > MAX_GEOMETRY_SECTORS:
            return cylinders, heads, track
        candidate += 1


def uuid_text(uuid: bytes) -> str:
    """An identifier as it is written: VHD files keep all of it big-endian."""
    groups = (uuid[:4], uuid[4:6], uuid[6:8], uuid[8:10], uuid[10:])
    return "-".join(group.hex() for group in groups)
