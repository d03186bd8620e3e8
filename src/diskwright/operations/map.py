"""Where the bytes of an image lie: in which file of its chain, and at what offset."""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent
from diskwright.block.record import Record
from diskwright.block.requests import check_range
from diskwright.operations.opening import SECTOR, Image, disk_size, open_image, require

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name


class MapEntry(Record):
    """A run of bytes that are alike.

    Attributes:
        start, length: in bytes of the image.
        depth: the layer that decides: 0 the image, 1 its backing file, and so on.
        present: that layer has something there.
        zero: it reads as zero.
        data: it takes room in a file.
        compressed: it does not lie there as it is.
        offset: where in `file` it lies, or None.
        file: the name of that file, or None.
    """

    __slots__ = (
        "start",
        "length",
        "depth",
        "present",
        "zero",
        "data",
        "compressed",
        "offset",
        "file",
    )

    def __init__(
        self,
        start: int,
        length: int,
        *,
        depth: int = 0,
        present: bool = False,
        zero: bool = False,
        data: bool = False,
        compressed: bool = False,
        offset: int | None = None,
        file: str | None = None,
    ) -> None:
        self.start = start
        self.length = length
        self.depth = depth
        self.present = present
        self.zero = zero
        self.data = data
        self.compressed = compressed
        self.offset = offset
        self.file = file

    def continues(self, after: MapEntry) -> bool:
        """Whether `after` can be joined to the end of this one."""
        if self.offset is None or after.offset is None:
            near = self.offset is after.offset
        else:
            near = self.offset + self.length == after.offset
        return near and (
            (self.depth, self.present, self.zero, self.data, self.compressed, self.file)
            == (after.depth, after.present, after.zero, after.data, after.compressed, after.file)
        )


def entries(node: Node, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
    """The runs of [start, start + length) of a node that is open, cut at the disk's end."""
    size = disk_size(node)
    stop = size if length is None else min(start + length, size)
    last: MapEntry | None = None
    for entry in _layers(node, start, max(start, min(stop, node.size)), 0):
        if last is not None and last.continues(entry):
            last.length += entry.length
            continue
        if last is not None:
            yield last
        last = entry
    if last is not None and stop > node.size and node.limits.request_alignment >= SECTOR:
        last.length += stop - node.size  # nobody can see less than a sector here
        stop = node.size
    if stop > max(node.size, start):  # the last sector is filled up with zeroes
        begin = max(node.size, start)
        offset = begin if last is not None and last.offset is not None else None
        file = last.file if last is not None else None
        rest = MapEntry(begin, stop - begin, present=True, zero=True, offset=offset, file=file)
        if last is not None and last.continues(rest):
            last.length += rest.length
        else:
            if last is not None:
                yield last
            last = rest
    if last is not None:
        yield last


def _layers(node: Node, start: int, stop: int, depth: int) -> Iterator[MapEntry]:
    """Entries of one layer and, where it has nothing, of those below."""
    if stop <= start:
        return
    node = node.unfiltered
    for extent in node.extents(start, stop - start, depth=0):
        if extent.kind == DATA and node.shows_holes:
            yield from _split_at_holes(node, extent, depth)
        elif extent.kind != UNALLOCATED:
            yield _entry(node, extent, depth)
        elif node.backing is not None:
            yield from _below(node, extent, depth)
        else:
            yield _nothing(node, extent, depth)


def _below(node: Node, extent: Extent, depth: int) -> Iterator[MapEntry]:
    """What the backing file shows in the place of `extent`; behind its end there is nothing."""
    assert node.backing is not None
    lower = node.backing.node
    inside = max(min(extent.end, disk_size(lower)), extent.offset)
    for entry in entries(lower, extent.offset, inside - extent.offset) if inside else ():
        entry.depth += depth + 1
        yield entry
    if inside < extent.end:
        yield _nothing(node, extent.clipped(inside, extent.end), depth)


def _nothing(node: Node, extent: Extent, depth: int) -> MapEntry:
    """The entry for a run that neither the layer nor one below has; it may have room reserved."""
    return MapEntry(
        extent.offset,
        extent.length,
        depth=depth,
        present=not node.can_have_backing,
        zero=True,
        offset=extent.host_offset,
        file=None if extent.host_offset is None else _file_of(node, extent),
    )


def _split_at_holes(node: Node, extent: Extent, depth: int) -> Iterator[MapEntry]:
    """Data that was there from the beginning: what is a hole of the file is zero as well."""
    child, host = extent.child, extent.host_offset
    if child is None or host is None or extent.encoded:
        yield _entry(node, extent, depth)
        return
    stop = max(min(host + extent.length, child.size), host)
    for below in child.node.extents(host, stop - host) if stop > host else ():
        start = extent.offset + below.offset - host
        entry = _entry(node, extent.clipped(start, start + below.length), depth)
        entry.zero = below.kind != DATA
        yield entry
    if stop < host + extent.length:
        entry = _entry(node, extent.clipped(extent.offset + stop - host, extent.end), depth)
        entry.zero = True
        yield entry


def _entry(node: Node, extent: Extent, depth: int) -> MapEntry:
    """The entry for a run of `node`; of bytes that are stored nowhere only zeroes are known."""
    is_data = extent.kind == DATA
    has_offset = extent.host_offset is not None and not extent.encoded
    has_offset = has_offset and (extent.allocated or not is_data)
    return MapEntry(
        extent.offset,
        extent.length,
        depth=depth,
        present=extent.allocated,
        zero=extent.kind == ZERO,
        data=(is_data and extent.allocated) or extent.stored,
        compressed=extent.encoded,
        offset=extent.host_offset if has_offset else None,
        file=_file_of(node, extent) if has_offset else None,
    )


def _file_of(node: Node, extent: Extent) -> str | None:
    """The name of the file where a run lies: a protocol is the file itself.

    A format that only passes on what its file has (raw) is looked through, and so are filters
    below it; others have one file.
    """
    if extent.child is None:
        return node.filename if node.is_protocol else None
    below = extent.child.node
    passes_on = not node.limits.cluster_size and not node.shows_holes
    return below.unfiltered.filename if passes_on else below.filename


def map(
    name: Name,
    *,
    format: str | None = None,
    start: int = 0,
    length: int | None = None,
    force_share: bool = False,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> list[MapEntry]:
    """The runs of an image, with the file and offset where each lies.

    Args:
        name, format, force_share, policy: as for `diskwright.info`.
        start, length: the part that is wanted, in bytes.
        cancel: a `threading.Event` or the like that ends it; nothing was
            changed.

    Raises:
        CancelledError: the flag was set.
        RangeError: the part begins or ends before the image.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("mapped.qcow2", "1M", format="qcow2")
        >>> with diskwright.open("mapped.qcow2", read_only=False) as node:
        ...     node.write(65536, b"data")
        >>> [(run.start, run.length, run.data) for run in diskwright.map("mapped.qcow2")]
        [(0, 65536, False), (65536, 65536, True), (131072, 917504, False)]
    """
    image = Image(name, format=format, force_share=force_share, policy=policy)
    for field, given in (("start", start), ("length", 0 if length is None else length)):
        require(isinstance(given, int), field, "a number of bytes", given)
    with cancellable(cancel), open_image(image) as node:
        if length is not None and length < 0:
            check_range(node, start, length)
        return list(entries(node, start, length))
