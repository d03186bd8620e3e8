"""The directory of persistent bitmaps, and their tables: read, checked, and packed.

Whatever does not fit the specification is refused as the image is opened, in QEMU's words and
order: a writer that understood a bitmap wrongly would lose what it notes.

Source: QEMU, docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import struct

from diskwright.block.record import Record
from diskwright.drivers.formats.qcow2.entries import OFFSET_MASK
from diskwright.drivers.formats.qcow2.extensions import name_of
from diskwright.drivers.formats.qcow2.header import Autoclear, bad_field
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.extensions import Bitmaps

#: table offset, table entries, flags, type, granularity bits, name bytes, extra data bytes
_ENTRY = struct.Struct(">QIIBBHI")

#: QEMU's bounds.
MAX_BITMAPS = 65535
MAX_DIRECTORY = MAX_BITMAPS * 1024
MAX_NAME = 1023
MAX_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 0x20000000
_GRANULARITY_BITS = range(9, 32)
_DIRTY_TRACKING = 1

#: Of an entry of the directory: a writer has not saved it yet; writes are noted.
IN_USE, AUTO = 1, 2
#: Of an entry of a bitmap's table: every bit that it stands for is 1.
ALL_ONES = 1
_RESERVED = 0xFF000000000001FE


class Entry(Record):
    """An entry of the directory."""

    __slots__ = ("bits", "flags", "raw_name", "table_entries", "table_offset")

    def __init__(
        self,
        raw_name: bytes,
        bits: int,
        flags: int,
        *,
        table_offset: int = 0,
        table_entries: int = 0,
    ) -> None:
        self.raw_name = raw_name
        self.bits = bits  # the granularity's binary logarithm
        self.flags = flags
        self.table_offset = table_offset
        self.table_entries = table_entries

    @classmethod
    def of(cls, name: str, bits: int, flags: int) -> Entry:
        """One without a table yet."""
        return cls(name.encode("utf-8", "surrogateescape"), bits, flags)

    @property
    def name(self) -> str:
        """What it is called; for QEMU a name ends at a zero byte."""
        return name_of(self.raw_name)

    def as_info(self) -> dict[str, object]:
        """What is told of it, in QEMU's words."""
        names = ((IN_USE, "in-use"), (AUTO, "auto"))
        flags = [name for bit, name in names if self.flags & bit]
        return {"flags": flags, "name": self.name, "granularity": 1 << self.bits}

    def pack(self) -> bytes:
        """The entry as stored, padded to eight bytes."""
        data = _ENTRY.pack(
            self.table_offset,
            self.table_entries,
            self.flags,
            _DIRTY_TRACKING,
            self.bits,
            len(self.raw_name),
            0,
        )
        data += self.raw_name
        return data + bytes(-len(data) % 8)


def extension_of(node: Qcow2) -> Bitmaps | None:
    """The bitmaps extension, where it is valid.

    Raises:
        FormatError: it is absurd.
    """
    if not node.header.autoclear_features & Autoclear.BITMAPS:
        return None
    found = node.extensions.bitmaps()
    if found is None:
        return None
    if found.reserved:
        raise bad_field("reserved", found.reserved, 4, "bitmaps_ext: Reserved field is not zero")
    if found.count > MAX_BITMAPS:
        text = (
            f"bitmaps_ext: Image has {found.count} bitmaps, exceeding the QEMU supported maximum "
            f"of {MAX_BITMAPS}"
        )
        raise bad_field("nb_bitmaps", found.count, 0, text)
    if not found.count:
        raise bad_field("nb_bitmaps", 0, 0, "found bitmaps extension with zero bitmaps")
    if found.directory_offset & (node.header.cluster_size - 1):
        text = "bitmaps_ext: invalid bitmap directory offset"
        raise bad_field("bitmap_directory_offset", found.directory_offset, 16, text)
    if found.directory_size > MAX_DIRECTORY:
        text = (
            f"bitmaps_ext: bitmap directory size ({found.directory_size}) exceeds the maximum "
            f"supported size ({MAX_DIRECTORY})"
        )
        raise bad_field("bitmap_directory_size", found.directory_size, 8, text)
    return found


def warn_of_stale(node: Qcow2) -> None:
    """Say that the image has bitmaps which a writer that did not know them left behind."""
    from diskwright.block.notice import warn

    what = "a program lacking bitmap support modified this file, so all bitmaps are now"
    if node.header.version < 3:
        what = (
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program "
            "without persistent bitmap support; so now they must all be"
        )
    warn(
        f"{what} considered inconsistent\nSome clusters may be leaked, run 'qemu-img check -r' on "
        "the image file to fix."
    )


def load(node: Qcow2) -> list[Entry]:
    """The valid bitmaps of an image; none where a writer that did not know them was there.

    Raises:
        FormatError: the directory is cut off or absurd.
    """
    extension = extension_of(node)
    if extension is None:
        return []
    if not extension.directory_size:
        text = "Requested bitmap directory size is zero"
        raise bad_field("bitmap_directory_size", 0, 8, text)
    data = node.file.read(extension.directory_offset, extension.directory_size)
    found: list[Entry] = []
    position = 0
    while position < len(data):
        if position + _ENTRY.size <= len(data) and len(found) == extension.count:
            text = "More bitmaps found than specified in header extension"
            raise bad_field("nb_bitmaps", extension.count, 0, text)
        entry, position = _parse(data, position, len(found))
        _require_sane(node, entry)
        found.append(entry)
    if len(found) < extension.count:
        text = "Less bitmaps found than specified in header extension"
        raise bad_field("nb_bitmaps", extension.count, 0, text, expected=len(found))
    return found


def _parse(data: bytes, position: int, number: int) -> tuple[Entry, int]:
    """(an entry, where the next one begins)."""
    begin = position + _ENTRY.size
    if begin > len(data):
        raise bad_field("bitmap directory", number, position, "Broken bitmap directory")
    table, entries, flags, kind, bits, name_length, extra = _ENTRY.unpack_from(data, position)
    stop = begin + name_length
    room = (stop + extra - position + (1 << 31)) % (1 << 32) - (1 << 31)  # an int, for QEMU
    if position + (room + 7 & ~7) > len(data):
        raise bad_field("bitmap directory", number, position, "Broken bitmap directory")
    if extra:
        text = "Bitmap extra data is not supported"
        raise bad_field("extra_data_size", extra, position + 20, text, expected=0)
    entry = Entry(data[begin:stop], bits, flags, table_offset=table, table_entries=entries)
    if kind != _DIRTY_TRACKING or name_length > MAX_NAME:
        raise _insane(entry, "type" if kind != _DIRTY_TRACKING else "raw_name")
    return entry, (stop + 7) & ~7


def _insane(entry: Entry, field: str) -> FormatError:
    text = f"Bitmap '{entry.name}' doesn't satisfy the constraints"
    return bad_field(field, getattr(entry, field, None), 0, text)


def _require_sane(node: Qcow2, entry: Entry) -> None:
    size = node.cluster_size
    if node.header.size_wraps:
        raise _insane(entry, "size")
    if not 0 < entry.table_entries <= MAX_TABLE_ENTRIES:
        raise _insane(entry, "table_entries")
    if not entry.table_offset or entry.table_offset & (size - 1):
        raise _insane(entry, "table_offset")
    if entry.bits not in _GRANULARITY_BITS:
        raise _insane(entry, "bits")
    if entry.flags & ~(IN_USE | AUTO):
        raise _insane(entry, "flags")
    room = entry.table_entries * size
    short = not entry.flags & IN_USE and node.header.size > room * 8 << entry.bits
    if room > MAX_BITMAP_BYTES or short:
        raise _insane(entry, "table_entries")


def table_entries(node: Qcow2, size: int, bits: int) -> int:
    """How many clusters a bitmap for a disk of `size` bytes takes."""
    granules = -(-size >> bits)
    return -(-granules // (8 * node.cluster_size))


def read_table(node: Qcow2, entry: Entry) -> array[int]:
    """The table of a bitmap that is not in use.

    Raises:
        FormatError: it is not as long as the disk wants it, or an entry is absurd.
    """
    raw = node.file.read(entry.table_offset, entry.table_entries * 8)
    table: array[int] = node.l1_slices.decode(raw)
    require_entries(node, entry, table)
    if entry.table_entries != table_entries(node, node.header.size, entry.bits):
        text = f"Could not read bitmap '{entry.name}' from image: Invalid argument"
        raise bad_field("bitmap_table_size", entry.table_entries, 8, text)
    return table


def require_entries(node: Qcow2, entry: Entry, table: array[int]) -> None:
    """Refuse a bitmap's table with an entry that is absurd.

    Raises:
        FormatError: there is one.
    """
    for number, item in enumerate(table):
        place = item & OFFSET_MASK
        if item & _RESERVED or (place and (item & ALL_ONES or place & (node.cluster_size - 1))):
            text = (
                f"Could not read bitmap_table table from image for bitmap '{entry.name}': "
                "Invalid argument"
            )
            raise bad_field("bitmap table", item, entry.table_offset + number * 8, text)


def areas(node: Qcow2) -> Iterator[tuple[str, int, int]]:
    """(bitmap's name, host offset, length) of all that they occupy; "" has the directory.

    Raises:
        FormatError: the directory or a table is absurd.
    """
    extension = extension_of(node)
    if extension is None:
        return
    yield "", extension.directory_offset, extension.directory_size
    for entry in load(node):
        for offset, length in areas_of(node, entry, strict=True):
            yield entry.name, offset, length


def areas_of(node: Qcow2, entry: Entry, *, strict: bool = False) -> Iterator[tuple[int, int]]:
    """(host offset, length) of a bitmap's table and its clusters.

    Args:
        node, entry: the image, the bitmap.
        strict: refuse a table that is absurd.
    """
    length = entry.table_entries * 8
    yield entry.table_offset, length
    if entry.table_offset + length > node.file.size + node.cluster_size:
        return
    table: array[int] = node.l1_slices.decode(node.file.read(entry.table_offset, length))
    if strict:
        require_entries(node, entry, table)
    for item in table:
        if item & OFFSET_MASK:
            yield item & OFFSET_MASK, node.cluster_size
