"""Do two images show the same disk?"""

from __future__ import annotations

from diskwright.block.extent import DATA, UNALLOCATED
from diskwright.block.record import Record
from diskwright.errors import CancelledError, DiskwrightError, errno_of
from diskwright.operations.opening import SECTOR, Image, disk_size, open_image, read_into
from diskwright.operations.source import may_hold, side_by_side
from diskwright.operations.workers import Steering, Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

#: Bytes that are read of each image and compared at a time.
PIECE = 1 << 19

SIZE = "size"
CONTENT = "content"
ALLOCATION = "allocation"


class Compared(Record):
    """What a comparison found.

    Attributes:
        identical: the disks show the same; with `strict`, in the same size and runs too.
        reason: what is not the same: SIZE, CONTENT, ALLOCATION, or None.
        offset: where: the first sector that is not the same, in bytes, or None.
        first_size, second_size: of the disks, in bytes. Where they are not the same, what only
            one of them has must read as zero for `identical`.
        lines: what QEMU's `compare` prints.
    """

    __slots__ = ("first_size", "identical", "lines", "offset", "reason", "second_size")

    def __init__(self, first_size: int, second_size: int) -> None:
        self.identical = True
        self.reason: str | None = None
        self.offset: int | None = None
        self.first_size = first_size
        self.second_size = second_size
        self.lines: list[str] = []


class _Pair:
    """A run of both disks and whether each may have other bytes than zero there."""

    __slots__ = ("first", "length", "offset", "second")

    def __init__(self, offset: int, length: int, first: bool, second: bool) -> None:
        self.offset = offset
        self.length = length
        self.first = first
        self.second = second


class _Comparison:
    """Two open nodes, and the first place known where they differ."""

    def __init__(
        self, first: Node, second: Node, steering: Steering, names: tuple[str, str]
    ) -> None:
        self.names = names
        self.first = first
        self.second = second
        self.sizes = disk_size(first), disk_size(second)
        self.stop = max(self.sizes)  # nothing from here on matters any more
        self.mismatch: int | None = None
        self.workers = Workers(steering, max(self.sizes), nodes=(first, second))

    def jobs(self) -> Iterator[_Pair]:
        """What has to be looked at, in pieces."""
        stop = max(self.sizes)
        runs = (may_hold(self.first, stop), may_hold(self.second, stop))
        kinds = side_by_side(*map(_telling, runs, self.names))
        for offset, end, one, other in kinds:
            if not one and not other:
                self.workers.advance(end - offset)
                continue
            while offset < end:
                if offset >= self.stop:
                    return
                cut = min((offset // PIECE + 1) * PIECE, end)
                yield _Pair(offset, cut - offset, one, other)
                offset = cut

    def worker(self) -> Callable[[_Pair], None]:
        """What compares one piece, with its two buffers."""
        one, other = bytearray(PIECE), bytearray(PIECE)
        zeroes = bytes(PIECE)

        def act(pair: _Pair) -> None:
            length = pair.length
            left: bytes | bytearray = zeroes
            right: bytes | bytearray = zeroes
            if pair.first:
                self._read(self.first, pair.offset, memoryview(one)[:length])
                left = one
            if pair.second:
                self._read(self.second, pair.offset, memoryview(other)[:length])
                right = other
            if length < PIECE:
                left, right = left[:length], right[:length]
            if left != right:
                self._differ(pair.offset + first_difference(left, right))
                return
            self.workers.advance(length, length)

        return act

    def _read(self, node: Node, offset: int, view: memoryview) -> None:
        try:
            read_into(node, offset, view)
        except DiskwrightError as error:
            from os import strerror

            error.qemu = (
                f"Error while reading offset {offset} of {self.names[node is self.second]}: "
                f"{strerror(errno_of(error))}"
            )
            error.offset, error.field = offset, CONTENT
            raise ReadFailure(error) from error

    def _differ(self, offset: int) -> None:
        """Keep the lowest such offset; pieces behind it need not be looked at."""
        if offset < self.stop:
            self.mismatch = self.stop = offset
            self.workers.ends_early = True


class ReadFailure(Exception):
    """Carries the error of a read to the end of the comparison; never seen outside."""

    def __init__(self, error: DiskwrightError) -> None:
        super().__init__()
        self.error = error


def first_difference(left: bytes | bytearray, right: bytes | bytearray) -> int:
    """The offset of the first sector in which two buffers of one length differ."""
    start, stop = 0, len(left)
    while stop - start > SECTOR:
        middle = start + (stop - start) // 2 // SECTOR * SECTOR
        middle = max(middle, start + SECTOR)
        if left[start:middle] != right[start:middle]:
            stop = middle
        else:
            start = middle
    return start


def _allocation_mismatch(first: Node, second: Node, names: tuple[str, str]) -> int | None:
    """The first offset that is allocated in one disk only, or of another kind there."""
    runs = map(_telling, (_states(first), _states(second)), names)
    for start, _, one, other in side_by_side(*runs):
        if one != other:
            return start
    return None


def _telling(runs: Iterator[Any], name: str) -> Iterator[Any]:
    """Runs of a disk; an error in finding one says which disk it was."""
    try:
        yield from runs
    except CancelledError:
        raise
    except DiskwrightError as error:
        error.qemu = f"Sector allocation test failed for {name}"
        error.field = ALLOCATION
        raise


def _states(node: Node) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """(end of the run, (decided by a layer, data, encoded, has a place in a file, the last one)).

    Over the whole chain. QEMU takes it for a difference when one run reaches the end of its disk
    and the other not.
    """
    for extent in node.extents(0, node.size):
        decided = extent.kind != UNALLOCATED and extent.allocated
        last = extent.end == node.size
        placed = extent.host_offset is not None
        yield extent.end, (decided, extent.kind == DATA, extent.encoded, placed, last)


def compare_nodes(
    first: Node,
    second: Node,
    *,
    strict: bool = False,
    steering: Steering | None = None,
    notice: Callable[[str], None] | None = None,
    names: tuple[str, str] | None = None,
) -> Compared:
    """Compare two nodes that are open; see `compare`.

    Args:
        notice: gets each line at once.
        names: what the caller calls the two in a sentence.
    """
    found = Compared(disk_size(first), disk_size(second))

    def say(line: str) -> None:
        found.lines.append(line)
        if notice is not None:
            notice(line)

    def differ(reason: str, line: str, offset: int | None = None) -> Compared:
        found.identical, found.reason, found.offset = False, reason, offset
        say(line)
        return found

    same_size = found.first_size == found.second_size
    if strict and not same_size:
        return differ(SIZE, "Strict mode: Image size mismatch!")
    names = names or (first.filename, second.filename)
    limit = _allocation_mismatch(first, second, names) if strict else None
    comparison = _Comparison(first, second, steering or Steering(), names)
    if limit is not None:
        comparison.stop = limit
    try:
        if comparison.stop:
            comparison.workers.run(comparison.jobs(), comparison.worker)
    except ReadFailure as failure:
        if not same_size and (failure.error.offset or 0) >= min(comparison.sizes):
            say("Warning: Image size mismatch!")
        raise failure.error from failure.__cause__
    mismatch = comparison.mismatch
    if not same_size and (mismatch is None or mismatch >= min(comparison.sizes)):
        say("Warning: Image size mismatch!")
    if mismatch is not None:
        return differ(CONTENT, f"Content mismatch at offset {mismatch}!", mismatch)
    if limit is not None:
        return differ(ALLOCATION, f"Strict mode: Offset {limit} block status mismatch!", limit)
    say("Images are identical.")
    return found


def compare_images(
    first: Image,
    second: Image,
    *,
    strict: bool = False,
    steering: Steering | None = None,
    notice: Callable[[str], None] | None = None,
    opened: Callable[[], None] | None = None,
) -> Compared:
    """Open two images and compare them; see `compare`. `opened` is called between the two."""
    names = (first.title, second.title)
    with open_image(first) as one:
        with open_image(second) as other:
            if opened is not None:
                opened()
            return compare_nodes(
                one, other, strict=strict, steering=steering, notice=notice, names=names
            )


def compare(
    first: Name,
    second: Name,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancel: Flag | None = None,
    force_share: bool = False,
    policy: Policy | None = None,
) -> Compared:
    """Compare what two images show.

    Args:
        first, second: a path, URI, "json:{…}", or a dict of options.
        first_format, second_format: their drivers; None probes.
        strict: sizes and allocated runs must be the same too.
        progress: called with (done, total) in bytes.
        cancel: a `threading.Event` or the like that ends the comparison.
        force_share: look although another process may write to them.
        policy: which backing files may be opened.

    Raises:
        CancelledError: the flag was set.
        IOFailure: an image could not be read.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("one.qcow2", "1M", format="qcow2")
        >>> made = diskwright.create("other.raw", "1M")
        >>> diskwright.compare("one.qcow2", "other.raw").identical
        True
        >>> with diskwright.open("other.raw", format="raw", read_only=False) as node:
        ...     node.write(70000, b"changed")
        >>> diskwright.compare("one.qcow2", "other.raw").offset
        69632
    """
    steering = Steering(progress=progress, cancel=cancel)
    return compare_images(
        Image(first, format=first_format, force_share=force_share, policy=policy),
        Image(second, format=second_format, force_share=force_share, policy=policy),
        strict=strict,
        steering=steering,
    )
