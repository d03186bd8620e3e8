"""What a run of a node's bytes is, and where it lies."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from diskwright.block.child import Child

DATA = 0
ZERO = 1
UNALLOCATED = 2

KIND_NAMES = ("data", "zero", "unallocated")

#: What `Node.locate` answers for bytes that lie nowhere and read as zero.
READS_ZERO = -2


class Extent(Record):
    """A run of bytes of one kind.

    Attributes:
        offset, length: the run, in bytes of the node that was asked.
        kind: DATA, ZERO or UNALLOCATED (nothing here: the backing file shows through).
        allocated: this layer (or, across layers, any layer down to `depth`) decides it.
        encoded: the bytes are compressed or encrypted where they lie.
        depth: 0 for the node asked, 1 for its backing file, and so on.
        child: where the bytes lie as they are, or None.
        host_offset: their offset in `child`, or None. A preallocated zero run has one too, and
            where nothing is but room is reserved.
        stored: a ZERO run of which the file has the zeroes, as an NBD server may tell.
    """

    __slots__ = (
        "offset",
        "length",
        "kind",
        "allocated",
        "encoded",
        "depth",
        "child",
        "host_offset",
        "stored",
    )

    def __init__(
        self,
        offset: int,
        length: int,
        kind: int,
        *,
        allocated: bool = True,
        encoded: bool = False,
        depth: int = 0,
        child: Child | None = None,
        host_offset: int | None = None,
        stored: bool = False,
    ) -> None:
        self.offset = offset
        self.length = length
        self.kind = kind
        self.allocated = allocated
        self.encoded = encoded
        self.depth = depth
        self.child = child
        self.host_offset = host_offset
        self.stored = stored

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.offset + self.length

    def clipped(self, start: int, stop: int) -> Extent:
        """The part of this run inside [start, stop)."""
        first = max(start, self.offset)
        last = min(stop, self.offset + self.length)
        host = self.host_offset
        return Extent(
            first,
            last - first,
            self.kind,
            allocated=self.allocated,
            encoded=self.encoded,
            depth=self.depth,
            child=self.child,
            host_offset=None
            if host is None
            else host + (0 if self.encoded else first - self.offset),
            stored=self.stored,
        )

    def continues(self, after: Extent) -> bool:
        """Whether `after` can be joined to the end of this run."""
        if (
            self.offset + self.length != after.offset
            or self.kind != after.kind
            or self.allocated != after.allocated
            or self.encoded != after.encoded
            or self.stored != after.stored
            or self.depth != after.depth
            or self.child is not after.child
        ):
            return False
        if self.host_offset is None or after.host_offset is None:
            return self.host_offset is after.host_offset
        return self.encoded or self.host_offset + self.length == after.host_offset


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbours that are alike, joined; what comes before an error is told before it."""
    last: Extent | None = None
    try:
        for extent in extents:
            if last is not None and last.continues(extent):
                last.length += extent.length
                continue
            if last is not None:
                yield last
            last = extent
    except DiskwrightError:
        if last is not None:
            yield last
        raise
    if last is not None:
        yield last
