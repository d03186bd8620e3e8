"""What is read by copies and comparisons: one node, or several one after the other.

A disk that is no multiple of a sector is filled up with zeroes, as everywhere in QEMU's tools.
"""

from __future__ import annotations

from diskwright.block.around import read_around
from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent
from diskwright.block.record import Record
from diskwright.errors import CancelledError, DiskwrightError
from diskwright.operations.opening import SECTOR, disk_size, read_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    One = TypeVar("One")
    Other = TypeVar("Other")

    from diskwright.block.child import Child
    from diskwright.block.node import Node

    Pieces = Iterator["Piece"]

#: What is left as it is in the target: its backing file shows the same.
SKIP = 3

#: Data runs at least this long are looked at in their file: it may have holes there.
HOLES_FROM = 1 << 20


class Piece(Record):
    """A run of the source.

    Attributes:
        offset, length: in bytes of the whole source.
        kind: DATA, ZERO or SKIP.
        child, host_offset: where the bytes lie as they are, or None.
    """

    __slots__ = ("child", "host_offset", "kind", "length", "offset")

    def __init__(
        self,
        offset: int,
        length: int,
        kind: int,
        *,
        child: Child | None = None,
        host_offset: int = -1,
    ) -> None:
        self.offset = offset
        self.length = length
        self.kind = kind
        self.child = child
        self.host_offset = host_offset

    def part(self, offset: int, length: int) -> Piece:
        """The piece of this piece."""
        host = self.host_offset + offset - self.offset if self.child is not None else -1
        return Piece(offset, length, self.kind, child=self.child, host_offset=host)


class Source:
    """Nodes one after the other.

    Args:
        nodes: open for reading.
        depth: how many backing files to look through; what lies below is SKIP. None for all.
        zero_from: the target reads as zero from there on: what is known to be zero is SKIP too.
    """

    def __init__(
        self, nodes: list[Node], *, depth: int | None = None, zero_from: int | None = None
    ) -> None:
        self.nodes = nodes
        self.starts: list[int] = []
        self.size = 0
        for node in nodes:
            self.starts.append(self.size)
            self.size += disk_size(node)
        self._depth = depth
        self._zero_from = self.size if zero_from is None else zero_from
        self._rests = all(one.read_only for node in nodes for one in node.graph.nodes)

    def pieces(self, unmapped: Callable[[int, DiskwrightError], None] | None = None) -> Pieces:
        """All of it, in order and without gaps.

        Args:
            unmapped: called with (offset, error) for each sector of which nobody can tell what
                it is, instead of giving up; it is data then. The offset is one of its node.
        """
        for node, start in zip(self.nodes, self.starts, strict=True):
            for extent in self._extents(node, unmapped):
                for piece in self._pieces(node, start, extent):
                    yield from self._without_zeroes(piece)
            rest = disk_size(node) - node.size
            if rest:
                yield Piece(start + node.size, rest, ZERO)

    def _without_zeroes(self, piece: Piece) -> Iterator[Piece]:
        """A piece, of known zeroes only what has to be written."""
        kept = self._zero_from - piece.offset
        if piece.kind != ZERO or kept >= piece.length:
            yield piece
            return
        if kept > 0:
            yield piece.part(piece.offset, kept)
        start = piece.offset + max(kept, 0)
        yield Piece(start, piece.offset + piece.length - start, SKIP)

    def _extents(
        self, node: Node, unmapped: Callable[[int, DiskwrightError], None] | None
    ) -> Iterator[Extent]:
        """The node's runs; sector by sector where they cannot be told, if that is wanted."""
        position, stop = 0, node.size
        while position < node.size:
            try:
                for extent in node.extents(position, stop - position, depth=self._depth):
                    yield extent
                    position = extent.end
            except CancelledError:
                raise
            except DiskwrightError as error:
                if unmapped is None:
                    raise
                if stop - position > SECTOR:
                    stop = position + SECTOR
                    continue
                unmapped(position, error)
                yield Extent(position, stop - position, DATA)
                position = stop
            stop = node.size

    def _pieces(self, node: Node, start: int, extent: Extent) -> Iterator[Piece]:
        offset = start + extent.offset
        overlay = self._depth is not None and node.unfiltered.backing is not None
        if extent.kind == UNALLOCATED and overlay:
            yield Piece(offset, extent.length, SKIP)
        elif extent.kind != DATA:
            yield Piece(offset, extent.length, ZERO)
        elif extent.encoded or extent.child is None or extent.host_offset is None:
            yield Piece(offset, extent.length, DATA)
        elif extent.length < HOLES_FROM or not extent.child.node.is_protocol:
            yield Piece(
                offset, extent.length, DATA, child=extent.child, host_offset=extent.host_offset
            )
        else:
            yield from _in_file(offset, extent)

    def read_piece(self, piece: Piece, view: memoryview) -> None:
        """Fill `view` with a DATA piece, from where its bytes lie if nobody can move them."""
        child = piece.child
        if child is None or not self._rests or not read_around(child, piece.host_offset, view):
            self.read_into(piece.offset, view)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`, which may reach over the end of a node."""
        nodes, starts = self.nodes, self.starts
        if len(nodes) == 1:
            read_into(nodes[0], offset, view)
            return
        index = self._index(offset)
        while len(view):
            stop = starts[index + 1] if index + 1 < len(nodes) else self.size
            part = view[: stop - offset]
            read_into(nodes[index], offset - starts[index], part)
            offset += len(part)
            view = view[len(part) :]
            index += 1

    def within(self, offset: int) -> int:
        """The offset in the node that has it."""
        return offset - self.starts[self._index(offset)]

    def _index(self, offset: int) -> int:
        from bisect import bisect_right

        return bisect_right(self.starts, offset) - 1


def _in_file(offset: int, extent: Extent) -> Iterator[Piece]:
    """A long data run, with the holes that its file has in it."""
    child, host = extent.child, extent.host_offset
    assert child is not None
    assert host is not None
    inside = max(min(extent.length, child.node.size - host), 0)
    for lower in child.node.extents(host, inside, depth=0) if inside else ():
        at = lower.offset
        yield Piece(
            offset + at - host,
            lower.length,
            DATA if lower.kind == DATA else ZERO,
            child=child if lower.kind == DATA else None,
            host_offset=at,
        )
    if inside < extent.length:
        yield Piece(offset + inside, extent.length - inside, ZERO)


def side_by_side(
    first: Iterator[tuple[int, One]], second: Iterator[tuple[int, Other]]
) -> Iterator[tuple[int, int, One, Other]]:
    """(start, stop, value of the first, of the second) of runs in which neither changes.

    Args:
        first, second: (end, value) of neighbouring runs that begin at 0.
    """
    one, other = next(first, None), next(second, None)
    position = 0
    while one is not None and other is not None:
        end = min(one[0], other[0])
        if end > position:
            yield position, end, one[1], other[1]
        position = end
        if one[0] == end:
            one = next(first, None)
        if other[0] == end:
            other = next(second, None)


def may_hold(node: Node | None, stop: int) -> Iterator[tuple[int, bool]]:
    """(end, whether there may be other bytes than zero) of a node's runs, up to `stop`."""
    reached = 0
    if node is not None:
        for piece in Source([node]).pieces():
            reached = piece.offset + piece.length
            yield min(reached, stop), piece.kind == DATA
            if reached >= stop:
                return
    if reached < stop:
        yield stop, False


class Window(Record):
    """Neighbouring pieces that are worked on together, [offset, offset + length)."""

    __slots__ = ("length", "offset", "pieces")

    def __init__(self, offset: int, length: int, pieces: list[Piece]) -> None:
        self.offset = offset
        self.length = length
        self.pieces = pieces

    @property
    def kind(self) -> int:
        """The kind of all of it, or DATA where it is mixed."""
        first = self.pieces[0].kind
        return first if len(self.pieces) == 1 else DATA


def whole_units(pieces: Iterable[Piece], unit: int) -> Iterator[Piece]:
    """Pieces of which SKIP begins and ends only where a unit does, or at the source's end.

    The part of a unit beside it becomes data to be read: only a whole unit can be encoded.
    """
    start = stop = 0  # of what is to be skipped and was not given yet
    for piece in pieces:
        if piece.kind == SKIP:
            if start == stop:
                start = piece.offset
            stop = piece.offset + piece.length
            continue
        yield from _cut_inwards(start, stop, unit)
        start = stop = 0
        yield piece
    yield from _cut_inwards(start, stop, unit, at_end=True)


def _cut_inwards(start: int, stop: int, unit: int, *, at_end: bool = False) -> Iterator[Piece]:
    """A run to be skipped, its parts of units at both ends as data."""
    first = min(-(-start // unit) * unit, stop)
    last = stop if at_end else max(stop // unit * unit, first)
    for begin, end, kind in ((start, first, DATA), (first, last, SKIP), (last, stop, DATA)):
        if begin < end:
            yield Piece(begin, end - begin, kind)


def windows(pieces: Iterable[Piece], length: Callable[[], int]) -> Iterator[Window]:
    """Pieces cut at multiples of a length and gathered between them.

    Args:
        pieces: in order, without gaps.
        length: asked before each cut, as it may become a multiple of what it was.

    A long piece that is no data is not cut more than necessary.
    """
    pending: list[Piece] = []
    unit = length()
    for piece in pieces:
        offset, stop = piece.offset, piece.offset + piece.length
        while offset < stop:
            if not pending:
                unit = length()
            if not pending and piece.kind != DATA and stop // unit * unit > offset:
                end = stop // unit * unit
                yield Window(offset, end - offset, [piece.part(offset, end - offset)])
                offset = end
                continue
            end = min(stop, (offset // unit + 1) * unit)
            pending.append(piece.part(offset, end - offset))
            offset = end
            if end % unit == 0:
                first = pending[0].offset
                yield Window(first, end - first, pending)
                pending = []
    if pending:
        first = pending[0].offset
        last = pending[-1]
        yield Window(first, last.offset + last.length - first, pending)
