"""Giving an overlay another backing file, with or without keeping what it shows."""

from __future__ import annotations

from diskwright.block.extent import UNALLOCATED
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, NoSpaceError, OptionError, UnsupportedError
from diskwright.operations.copy import Copied, Copying
from diskwright.operations.opening import Image, open_image, path_of, read_into
from diskwright.operations.sinks import located, sink_kind
from diskwright.operations.source import may_hold, side_by_side
from diskwright.operations.workers import Steering, Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

#: Bytes that are read of both backing files and compared at a time.
WINDOW = 1 << 19


class Rebased(Record):
    """What was done.

    Attributes:
        name: of the overlay.
        backing, backing_format: what it names now, or None.
        copied_bytes: written to the overlay, because the new backing file does not show them.
    """

    __slots__ = ("backing", "backing_format", "copied_bytes", "name")

    def __init__(
        self, name: str, backing: str | None, backing_format: str | None, *, copied_bytes: int
    ) -> None:
        self.name = name
        self.backing = backing
        self.backing_format = backing_format
        self.copied_bytes = copied_bytes


class Below(Record):
    """The backing file that is to be.

    Attributes:
        name: as the overlay shall name it, relative to itself; "" for none.
        format: its driver.
        cache: the cache mode in which it is read.
        force_share: read it although another process may write to it.
    """

    __slots__ = ("cache", "force_share", "format", "name")

    def __init__(
        self,
        name: str,
        format: str | None = None,
        *,
        cache: str = "writeback",
        force_share: bool = False,
    ) -> None:
        self.name = name
        self.format = format
        self.cache = cache
        self.force_share = force_share


def rebase_image(
    image: Image,
    below: Below,
    *,
    unsafe: bool = False,
    compress: bool = False,
    steering: Steering | None = None,
    opened: Callable[[Node], None] | None = None,
) -> Rebased:
    """Open an overlay and change its backing file.

    Args:
        image: the overlay.
        below: the new backing file.
        unsafe: change the name only; what the overlay shows changes if the files differ.
        compress: what is copied into the overlay is compressed.
        steering: who watches.
        opened: gets the overlay's node before anything is changed.

    Raises:
        UnsupportedError: the format names no backing file.
        CancelledError: the caller's flag was set; the overlay shows what it showed, and names
            the old backing file.
    """
    with open_image(image, read_only=False, follow_backing=not unsafe) as top:
        if opened is not None:
            opened(top)
        _check_request(top, below, compress=compress)
        if below.name and below.format is None and top.can_have_backing and top.parent_option:
            below = Below(below.name, top.driver, cache=below.cache, force_share=below.force_share)
        copied = 0
        if below.name and not unsafe and not top.can_have_backing:
            _open_new(top, image, below).close()  # it is named first, if it is wrong too
        if not unsafe and top.can_have_backing:
            difference = _Difference(top, compress=compress, steering=steering or Steering())
            copied = _copy_differences(difference, image, below)
        _change(top, below)
        return Rebased(
            image.title,
            below.name or None,
            below.format if below.name else None,
            copied_bytes=copied,
        )


def _check_request(top: Node, below: Below, *, compress: bool) -> None:
    """What cannot be, whatever the new backing file is."""
    from diskwright.block import registry

    if compress and not top.encodes():
        raise UnsupportedError("Compression not supported for this file format")
    if below.format is not None and not registry.is_known(below.format):
        raise OptionError(f"Invalid format name: '{below.format}'", field="backing_format")


def _change(top: Node, below: Below) -> None:
    """Write the new name into the overlay."""
    sentence = f"Could not change the backing file to '{below.name}'"
    if below.name and below.format is None:
        raise OptionError(
            f"{sentence}: its format is not known",
            qemu=f"{sentence}: backing format must be specified",
            field="backing_format",
            hint="say raw, qcow2 or what it is",
        )
    if not top.can_have_backing:
        raise UnsupportedError(
            f"{sentence}: the {top.driver} format has none",
            qemu=f"{sentence}: Operation not supported",
        )
    try:
        top.change_backing(below.name or None, below.format if below.name else None)
    except NoSpaceError as error:  # of the image's first cluster
        error.qemu = f"{sentence}: No space left in the file header"
        raise
    except DiskwrightError as error:
        error.within(sentence)
        raise


def _copy_differences(difference: _Difference, image: Image, below: Below) -> int:
    """Bring into the overlay what only its old backing file shows; returns how many bytes."""
    if not below.name:
        return difference.copy(None)
    with _open_new(difference.top, image, below) as new:
        return difference.copy(new)


def _open_new(top: Node, image: Image, below: Below) -> Node:
    from diskwright.block import filename

    name = filename.join_at(top, below.name)
    wanted = Image(
        name,
        format=below.format,
        cache=below.cache,
        force_share=below.force_share,
        policy=image.policy,
    )
    try:
        return open_image(wanted)
    except DiskwrightError as error:
        nested = f"Could not open '{wanted.title}': "
        text = error.qemu_message.removeprefix(nested)
        error.qemu = f"Could not open new backing file '{below.name}': {text}"
        raise


class _Difference:
    """Where an overlay has nothing and its old and new backing file may differ."""

    def __init__(self, top: Node, *, compress: bool, steering: Steering) -> None:
        self.top = top
        self.old = None if top.backing is None else top.backing.node
        self.new: Node | None = None
        limits = top.limits  # a subcluster may have bytes of its own, but none is compressed
        part = limits.cluster_size if compress else limits.zero_alignment
        self.unit = max(min(part or limits.cluster_size, limits.cluster_size), 512)
        self.window = max(WINDOW // self.unit, 1) * self.unit
        self.copied = Copied()
        kind = sink_kind(top, compress=compress)
        how = Copying(sparse_bytes=0)
        self.sink = kind(top, how, self.unit, self.copied, finest=self.unit)
        # Behind the old backing file all is zero, and becomes zero clusters.
        self.edge = 0 if self.old is None else -(-self.old.size // self.unit) * self.unit
        self.workers = Workers(steering, top.size, nodes=(top,))

    def copy(self, new: Node | None) -> int:
        """Compare with the new backing file, and write; returns how many bytes."""
        self.new = new
        self.workers.run(self._jobs(), self._worker)
        return self.copied.data_bytes

    def _jobs(self) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of what has to be read."""
        size, number = self.top.size, 0
        both = side_by_side(may_hold(self.old, size), may_hold(self.new, size))
        kinds = _whole_units(((stop, one or other) for _, stop, one, other in both), self.unit)
        for start, stop, missing, matters in side_by_side(_unallocated(self.top), kinds):
            if not missing or not matters:
                self.workers.advance(stop - start)
                continue
            while start < stop:
                end = min((start // self.window + 1) * self.window, stop)
                yield number, start, end
                number += 1
                start = end

    def _worker(self) -> Callable[[tuple[int, int, int]], None]:
        one, other = bytearray(self.window), bytearray(self.window)

        def act(job: tuple[int, int, int]) -> None:
            number, start, stop = job
            length = stop - start
            self._read(self.old, start, memoryview(one)[:length])
            self._read(self.new, start, memoryview(other)[:length])
            try:
                if one[:length] != other[:length]:
                    self._write_units(number, start, memoryview(one)[:length], other)
                self.sink.end(number)
            except DiskwrightError as error:
                self.sink.stop()
                raise located(error, "Error while writing to COW image") from error
            except BaseException:
                self.sink.stop()
                raise
            self.workers.advance(length, length)

        return act

    def _write_units(self, number: int, start: int, old: memoryview, new: bytearray) -> None:
        """Write the neighbouring units that differ."""
        from itertools import pairwise

        length, unit = len(old), self.unit
        begin = -1
        bounds = [0, *range(unit - start % unit, length, unit), length]
        for at, end in pairwise(bounds):
            differs = bytes(old[at:end]) != new[at:end]
            if differs and begin < 0:
                begin = at
            elif not differs and begin >= 0:
                self._write(number, start + begin, old[begin:at])
                begin = -1
        if begin >= 0:
            self._write(number, start + begin, old[begin:])

    def _write(self, number: int, offset: int, view: memoryview) -> None:
        data = min(max(self.edge - offset, 0), len(view))
        if data:
            self.sink.write(number, offset, view[:data])
        if data < len(view):
            self._write_zeroes(number, offset + data, view[data:])

    def _write_zeroes(self, number: int, offset: int, view: memoryview) -> None:
        """Zero clusters, or zeroes as data where the format has no such clusters.

        There zeroing leaves alone what reads as zero, as it does while the old file is below.
        """
        self.sink.write_zeroes(offset, len(view))
        here = self.top.extents(offset, len(view), depth=0)
        if any(extent.kind == UNALLOCATED for extent in here):
            self.sink.write(number, offset, view)

    def _read(self, node: Node | None, offset: int, view: memoryview) -> None:
        if node is None:
            view[:] = bytes(len(view))
            return
        try:
            read_into(node, offset, view)
        except DiskwrightError as error:
            which = "old" if node is self.old else "new"
            raise located(error, f"error while reading from {which} backing file") from error


def _whole_units(runs: Iterator[tuple[int, bool]], unit: int) -> Iterator[tuple[int, bool]]:
    """(end, value) of runs that end at whole units; one is true if a part of it is."""
    start = done = 0
    for stop, matters in runs:
        if matters:
            if start - start % unit > done:
                yield start - start % unit, False
            done = max(-(-stop // unit) * unit, done)
            yield done, True
        start = stop
    yield start, False


def _unallocated(node: Node) -> Iterator[tuple[int, bool]]:
    """(end, whether the backing file shows through) of a node's runs."""
    for extent in node.extents(0, node.size, depth=0):
        yield extent.end, extent.kind == UNALLOCATED


def rebase(
    name: Name,
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    compress: bool = False,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Flag | None = None,
    rate: int | str = 0,
    policy: Policy | None = None,
) -> Rebased:
    """Give an overlay another backing file, and copy what the new one does not show.

    Args:
        name, format: as for `diskwright.info`.
        backing: the new backing file, relative to the overlay; None for none at all.
        backing_format: its driver.
        unsafe: only change the name: for a backing file that was moved. If the new one shows
            other bytes, so does the overlay.
        compress: what is copied is compressed.
        progress: called with (done, total) in bytes.
        cancel: a `threading.Event` or the like that ends it.
        rate: bytes a second at most.
        policy: which backing files may be opened.

    Raises: as `rebase_image`.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("old.qcow2", "1M", format="qcow2")
        >>> made = diskwright.create(
        ...     "work.qcow2", format="qcow2", backing="old.qcow2", backing_format="qcow2"
        ... )
        >>> with diskwright.open("old.qcow2", read_only=False) as node:
        ...     node.write(0, b"from the old one")
        >>> diskwright.rebase("work.qcow2", None).copied_bytes
        65536
        >>> with diskwright.open("work.qcow2") as node:
        ...     node.read(0, 16)
        b'from the old one'
    """
    from diskwright.operations.create import size_of

    return rebase_image(
        Image(name, format=format, policy=policy),
        Below("" if backing is None else path_of(backing), backing_format),
        unsafe=unsafe,
        compress=compress,
        steering=Steering(progress=progress, cancel=cancel, rate=size_of(rate)),
    )
