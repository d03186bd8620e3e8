"""What a server offers: a node under a name, and what block status says of it.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Metadata querying"; what each bit stands for was
taken from running qemu-nbd.
"""

from __future__ import annotations

from diskwright.block.extent import DATA, UNALLOCATED
from diskwright.errors import NotFoundError, OptionError
from diskwright.wire.nbd.messages import Export
from diskwright.wire.nbd.numbers import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    MAX_PAYLOAD,
    MAX_STRING,
    Allocation,
    Transmission,
)
from diskwright.wire.nbd.server import contexts_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.block.bitmap import DirtyBitmap
    from diskwright.block.child import Child
    from diskwright.block.extent import Extent
    from diskwright.block.node import Node

    Run = tuple[int, int]  # length, bits

#: The length that clients are told to prefer, and the longest that they are told to ask for.
_PREFERRED = 4096
_SECTOR = 512


def check_told(what: str, text: str) -> None:
    """Refuse what clients could not be told of an export: its name, or its description.

    Raises:
        OptionError: it is too long.
    """
    if len(text.encode("utf-8", "surrogateescape")) > MAX_STRING:
        raise OptionError(f"export {what} '{text}' too long", field=what)


class NodeExport:
    """A node under a name.

    Args:
        node: what is served; it stays the caller's.
        name: by which clients ask for it; "" is the one that a client gets without a name.
        description: a text for people.
        read_only: clients may not write, whether or not the node takes it.
        clients: how many there may be at once; 0: any number.
        depth: clients may ask how deep in the chain of backing files the bytes lie.
        bitmaps: names of the node's dirty bitmaps that clients may ask for.

    Raises:
        OptionError: a name is too long.
        NotFoundError: there is no such bitmap.
    """

    def __init__(
        self,
        node: Node,
        name: str = "",
        *,
        description: str = "",
        read_only: bool = False,
        clients: int = 1,
        depth: bool = False,
        bitmaps: Sequence[str] = (),
    ) -> None:
        for what, text in (("name", name), ("description", description)):
            check_told(what, text)
        self.node = node
        self.read_only = read_only or node.read_only
        self._bitmaps = {found: self._bitmap(found) for found in bitmaps}
        size = -(-node.size // _SECTOR) * _SECTOR  # guests see whole sectors
        told = Export(name, size, self._flags(clients))
        told.description = description
        told.blocks = (
            _least(node),
            max(_PREFERRED, node.limits.request_alignment),
            MAX_PAYLOAD,
        )
        told.contexts = contexts_of(list(bitmaps), depth=depth)
        self.told = told

    def _flags(self, clients: int) -> int:
        flags = Transmission.HAS_FLAGS | Transmission.SEND_FLUSH | Transmission.SEND_FUA
        flags |= Transmission.SEND_CACHE
        if clients != 1:  # all clients use one node: a flush by one covers all
            flags |= Transmission.CAN_MULTI_CONN
        if self.read_only:
            return flags | Transmission.READ_ONLY
        return (
            flags
            | Transmission.SEND_TRIM
            | Transmission.SEND_WRITE_ZEROES
            | Transmission.SEND_FAST_ZERO
        )

    def _bitmap(self, name: str) -> DirtyBitmap:
        """The bitmap of that name, in the node or the first of its chain that has it."""
        node: Node | None = self.node
        while node is not None:
            inner = node.unfiltered
            if any(info.name == name for info in inner.dirty_bitmaps()):
                return inner.dirty_bitmap(name)
            node = inner.backing.node if inner.backing is not None else None
        raise NotFoundError(f"Bitmap '{name}' is not found")

    # --------------------------------------------------------------------------- block status

    def status(self, context: str, offset: int, length: int, limit: int) -> list[Run]:
        """(length, bits) of each run from `offset` on, at most `limit` of them.

        Args:
            context: one of the export's.
            offset, length: in bytes, inside of the node.
            limit: of how many runs is told.
        """
        found: list[Run] = []
        for run_length, bits in self._runs(context, offset, length):
            if found and found[-1][1] == bits:
                found[-1] = (found[-1][0] + run_length, bits)
            elif len(found) == limit:
                break
            else:
                found.append((run_length, bits))
        return found

    def _runs(self, context: str, offset: int, length: int) -> Iterator[Run]:
        if context not in (BASE_ALLOCATION, ALLOCATION_DEPTH):
            bitmap = self._bitmaps[context.removeprefix(DIRTY_BITMAP)]
            yield from self._dirty(bitmap, offset, length)
            return
        of_extent = _allocation if context == BASE_ALLOCATION else _depth
        inside = max(min(length, self.node.size - offset), 0)
        for extent in self.node.extents(offset, inside) if inside else ():
            yield from of_extent(extent)
        if inside < length:  # what the last sector is filled up with
            yield length - inside, Allocation.ZERO | Allocation.HOLE

    def _dirty(self, bitmap: DirtyBitmap, offset: int, length: int) -> Iterator[Run]:
        at, stop = offset, offset + length
        for start, count in bitmap.runs(offset, length):
            if start > at:
                yield start - at, 0
            yield count, 1
            at = start + count
        if at < stop:
            yield stop - at, 0


def _least(node: Node) -> int:
    """How short clients' requests may be. Raw pads them; where it was guessed, to sectors."""
    if node.driver == "raw":
        return _SECTOR if node.probed else 1
    return node.limits.request_alignment


def _allocation(extent: Extent) -> Iterator[Run]:
    """base:allocation; data that lie over a hole of their file are zero and no hole."""
    child, host = extent.child, extent.host_offset
    if extent.kind != DATA:
        yield extent.length, Allocation.ZERO | Allocation.HOLE
    elif not extent.allocated:  # it can be read, and says nothing
        yield extent.length, Allocation.HOLE
    elif child is None or host is None or extent.encoded or not _shows_holes(child):
        yield extent.length, 0
    else:
        inside = max(min(extent.length, child.size - host), 0)
        for below in child.node.extents(host, inside) if inside else ():
            yield below.length, 0 if below.kind == DATA else Allocation.ZERO
        if inside < extent.length:
            yield extent.length - inside, Allocation.ZERO


def _shows_holes(child: Child) -> bool:
    return child.parent is not None and child.parent.shows_holes


def _depth(extent: Extent) -> Iterator[Run]:
    """qemu:allocation-depth. 0: in no layer; 1: in the first; and so on."""
    there = extent.allocated and extent.kind != UNALLOCATED
    yield extent.length, extent.depth + 1 if there else 0
