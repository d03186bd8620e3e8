"""Writing the first cluster anew: header, extensions, backing file's name.

A device writes a sector as a whole. So the first one, which is written last, decides whether the
old content or the new one is valid, and until then what the old one needs must stay: the name, and
extensions that reach out of that sector.
"""

from __future__ import annotations

import struct

from diskwright.drivers.formats.qcow2.extensions import without_features
from diskwright.drivers.formats.qcow2.header import MAGIC, Header
from diskwright.drivers.formats.qcow2.refcounts import SECTOR
from diskwright.errors import NoSpaceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2

#: Where the header says where the backing file's name begins.
_NAME_OFFSET = struct.Struct(">Q")
_NAME_OFFSET_AT = 8


def write(node: Qcow2) -> None:
    """Write header, extensions and name as they are in memory, durably; under the header lock.

    Raises:
        NoSpaceError: they do not fit into a cluster.
    """
    place = _name_place(node)
    packed = _packed(node, *place)
    rest = packed[SECTOR:]
    if rest and rest != node.first_bytes[SECTOR : len(packed)]:
        _clear_way(node, *place, length=len(packed))
        node.file.write(SECTOR, rest)
        node.file.flush()
    node.file.write(0, packed[:SECTOR])
    stale = node.first_bytes[len(packed) :].rstrip(b"\0")
    node.first_bytes = packed.ljust(len(node.first_bytes), b"\0")
    with node.metadata_lock:
        node.refcounts.header_changed()
    node.file.flush()
    if stale:
        node.file.write(len(packed), bytes(len(stale)))  # whether it is there or not


def _name_place(node: Qcow2) -> tuple[int, int]:
    """Where the backing file's name lies: its first byte, and the one behind it."""
    start = node.header.backing_file_offset
    return start, start + node.header.backing_file_size


def _packed(node: Qcow2, start: int, end: int) -> bytes:
    """The new content. The new name lies behind the old one, [start, end), if there is room."""
    header = node.header
    packed = node.extensions.pack(header)
    place = header.backing_file_offset
    if len(packed) <= SECTOR or place >= end or place + header.backing_file_size <= start:
        return packed
    try:
        packed = node.extensions.pack(header, behind=-(-end // 8) * 8)
    except NoSpaceError:
        return node.extensions.pack(header)
    if start < node.extensions.end(header):
        return packed
    return packed[:start] + node.first_bytes[start:end] + packed[end:]  # the old name stays


def _clear_way(node: Qcow2, start: int, end: int, *, length: int) -> None:
    """Let the old content be valid without what is going to be written over.

    Args:
        node: the image.
        start, end: where the old name lies.
        length: of the new content, in bytes.
    """
    old = node.file.read(0, node.cluster_size)
    if not old.startswith(MAGIC):
        return  # it is being made, and no format claims it as yet: nothing has to stay valid
    if end > SECTOR and start < node.extensions.end(node.header):
        old = _move_name(node, old, start, end, behind=max(length, end))
    short = without_features(Header.parse(old), old, SECTOR)
    if short is not None:
        node.file.write(0, short)
    node.file.flush()


def _move_name(node: Qcow2, old: bytes, start: int, end: int, *, behind: int) -> bytes:
    """Put the old name behind everything, if there is room; returns the cluster as it is then."""
    place = -(-behind // 8) * 8
    stop = place + end - start
    if stop > node.cluster_size:
        return old
    node.file.write(place, old[start:end])
    node.file.flush()
    moved = bytearray(old)
    moved[place:stop] = old[start:end]
    _NAME_OFFSET.pack_into(moved, _NAME_OFFSET_AT, place)
    node.file.write(0, moved[:SECTOR])
    node.first_bytes = bytes(moved)
    return node.first_bytes
