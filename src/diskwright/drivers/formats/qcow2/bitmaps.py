"""Persistent bitmaps, as far as they are kept: where their metadata and data lie.

Source: QEMU, docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import struct
from array import array

from diskwright.drivers.formats.qcow2.entries import OFFSET_MASK
from diskwright.drivers.formats.qcow2.header import Autoclear, bad_field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.drivers.formats.qcow2.driver import Qcow2

#: table offset, table size, flags, type, granularity bits, name size, extra data size
_ENTRY = struct.Struct(">QIIBBHI")

#: QEMU's bounds.
_MAX_BITMAPS = 65535
_MAX_DIRECTORY = _MAX_BITMAPS * 1024
_MAX_TABLE_ENTRIES = (0x7FFFFFFF // 8) >> 3

_IN_USE, _AUTO = 1, 2


class Bitmap:
    """An entry of the bitmap directory."""

    __slots__ = ("flags", "granularity", "name", "table_entries", "table_offset")

    def __init__(self, name: str, granularity: int, flags: int, table: tuple[int, int]) -> None:
        self.name = name
        self.granularity = granularity  # bytes of the disk a bit stands for
        self.flags = flags
        self.table_offset, self.table_entries = table

    def as_info(self) -> dict[str, object]:
        """What is told of it, in QEMU's words."""
        names = ((_IN_USE, "in-use"), (_AUTO, "auto"))
        flags = [name for bit, name in names if self.flags & bit]
        return {"flags": flags, "name": self.name, "granularity": self.granularity}


def load(node: Qcow2) -> list[Bitmap]:
    """The valid bitmaps of an image; none where a writer that did not know them was there.

    Raises:
        FormatError: the directory is cut off or absurd.
    """
    extension = node.extensions.bitmaps()
    if extension is None or not node.header.autoclear_features & Autoclear.BITMAPS:
        return []
    size, offset = extension.directory_size, extension.directory_offset
    if not 0 < extension.count <= _MAX_BITMAPS:
        raise bad_field("nb_bitmaps", extension.count, 0, "bitmaps_ext: too many dirty bitmaps")
    if size > _MAX_DIRECTORY or offset & (node.cluster_size - 1):
        raise bad_field("bitmap_directory", size, 0, "bitmaps_ext: invalid bitmap directory")
    data = node.file.read(offset, size)
    found, position = [], 0
    for number in range(extension.count):
        stop = position + _ENTRY.size
        if stop > len(data):
            raise bad_field("bitmap directory", number, position, "Broken bitmap directory")
        table, entries, flags, _, bits, name_length, extra = _ENTRY.unpack_from(data, position)
        start = stop + extra
        stop = start + name_length
        if stop > len(data) or entries > _MAX_TABLE_ENTRIES or bits > 63:
            raise bad_field("bitmap directory", number, position, "Broken bitmap directory")
        name = data[start:stop].decode("utf-8", "replace")
        found.append(Bitmap(name, 1 << bits, flags, (table, entries)))
        position = (stop + 7) & ~7
    return found


def areas(node: Qcow2) -> Iterator[tuple[int, int]]:
    """(host offset, length) of all that the bitmaps occupy."""
    found = load(node)
    extension = node.extensions.bitmaps()
    if not found or extension is None:
        return
    yield extension.directory_offset, extension.directory_size
    for bitmap in found:
        length = bitmap.table_entries * 8
        yield bitmap.table_offset, length
        if bitmap.table_offset + length > node.file.size + node.cluster_size:
            continue
        table: array[int] = node.l1_slices.decode(node.file.read(bitmap.table_offset, length))
        for entry in table:
            if entry & OFFSET_MASK:
                yield entry & OFFSET_MASK, node.cluster_size
