"""The copy engine: from nodes to a node, as fast as their formats and file systems allow.

The source's runs are gathered into windows (source.py), and threads take one after the other
(workers.py). Of each window the pieces that hold data are shared with the target's file where
the file system does that (sharing.py), else read into the thread's buffer, looked through for
zeroes, and written (sinks.py).
"""

from __future__ import annotations

from _thread import allocate_lock

from diskwright.block.around import LONGEST_WRITE
from diskwright.block.extent import DATA, ZERO
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError
from diskwright.operations.opening import SECTOR
from diskwright.operations.sinks import located, sink_kind
from diskwright.operations.source import SKIP, Piece, Window, whole_units, windows
from diskwright.operations.workers import Steering, Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from mmap import mmap

    from diskwright.block.node import Node
    from diskwright.operations.sharing import Sharing
    from diskwright.operations.source import Source

    Job = tuple[int, Window]

#: Bytes that a thread works on at a time. They are written with one call: while that holds the
#: file's lock the other thread reads, and after two calls in a row both would. Greater buffers
#: fall out of the processor's cache, smaller ones cost more calls.
WINDOW = LONGEST_WRITE

#: Known zeroes are told apart in pieces of this length: blocks of file systems are not shorter.
FINEST = 4096

#: Encoded units that a thread makes at a time, and the bytes they may have together.
UNITS = 16
MAX_ENCODED_WINDOW = 4 << 20

#: Where blocks are shared, no bytes move, and longer windows cost less.
SHARED_WINDOW = 16 << 20


class Copying(Record):
    """How to copy.

    Attributes:
        compress: store encoded units, where the format has such.
        sparse_bytes: runs of zeroes at least this long are not stored; 0 stores all of them.
        looks: whether zeroes are looked for in data, or only runs that the source calls zero
            are taken for such.
        offload: let the kernel copy (True), never (False), or where blocks can be shared (None).
        salvage: called with (offset, error) for each sector that cannot be read, the offset one
            of its node; zeroes take its place. None lets such an error end the copy.
        unmapped: while salvaging, called with (offset, error) for each sector of which it cannot
            be told what it is; it is read then.
        target_is_zero: the target reads as zero everywhere, zeroes need not be written.
        bitmaps: dirty bitmaps are wanted in the target too (QEMU's `--bitmaps`).
        skip_broken_bitmaps: inconsistent ones are left out, with a warning.
        in_order: space in the target is taken in the order of the source, so that its file is not
            scattered; False writes each window when it has been read (QEMU's `-W`).
    """

    __slots__ = (
        "bitmaps",
        "compress",
        "in_order",
        "looks",
        "offload",
        "salvage",
        "skip_broken_bitmaps",
        "sparse_bytes",
        "target_is_zero",
        "unmapped",
    )

    def __init__(
        self,
        *,
        compress: bool = False,
        sparse_bytes: int = 4096,
        looks: bool = True,
        offload: bool | None = None,
        salvage: Callable[[int, DiskwrightError], None] | None = None,
        unmapped: Callable[[int, DiskwrightError], None] | None = None,
        target_is_zero: bool = False,
        bitmaps: bool = False,
        skip_broken_bitmaps: bool = False,
        in_order: bool = False,
    ) -> None:
        self.bitmaps = bitmaps
        self.skip_broken_bitmaps = skip_broken_bitmaps
        self.in_order = in_order
        self.compress = compress
        self.sparse_bytes = sparse_bytes
        self.looks = looks
        self.offload = offload
        self.salvage = salvage
        self.target_is_zero = target_is_zero
        self.unmapped = unmapped


class Copied(Record):
    """What a copy moved, in bytes of the disk; threads count in it.

    Attributes:
        data_bytes: written.
        zero_bytes: found to be zero; not written where the target reads as zero anyway.
        shared_bytes: left to the file system, which shares or copies blocks.
        salvaged_bytes: could not be read and were replaced by zeroes.
    """

    __slots__ = ("data_bytes", "salvaged_bytes", "shared_bytes", "zero_bytes")
    _lock = allocate_lock()  # of all records: it is held for an addition

    def __init__(self) -> None:
        self.data_bytes = 0
        self.zero_bytes = 0
        self.shared_bytes = 0
        self.salvaged_bytes = 0

    def count(self, data: int = 0, zero: int = 0, shared: int = 0, salvaged: int = 0) -> None:
        """Add to the numbers."""
        with self._lock:
            self.data_bytes += data
            self.zero_bytes += zero
            self.shared_bytes += shared
            self.salvaged_bytes += salvaged


def copy(source: Source, target: Node, copying: Copying, steering: Steering) -> Copied:
    """Copy all of `source` to the beginning of `target`, which is open for writing.

    Raises:
        CancelledError: the caller's flag was set; the target holds a part.
        IOFailure: something could not be read or written; its `qemu` says where.
    """
    copier = Copier(source, target, copying, steering)
    copier.run()
    return copier.copied


class Copier:
    """One copy; see `copy`."""

    def __init__(self, source: Source, target: Node, copying: Copying, steering: Steering) -> None:
        self.source = source
        self.target = target
        self.copying = copying
        self.copied = Copied()
        encoder = self.encoder = target.encoder() if copying.compress else None
        unit = zero_unit(target, copying)
        if encoder is not None:
            unit = max(unit, encoder.unit)
            wanted = min(unit * UNITS, MAX_ENCODED_WINDOW)
        else:
            wanted = WINDOW
        look = look_unit(copying, unit)
        self.window = max(max(wanted, copying.sparse_bytes) // look, 1) * look
        kind = sink_kind(target, compress=copying.compress)
        finest = look_unit(copying, SECTOR)
        self.sink = kind(target, copying, look, self.copied, finest=finest)
        self._zero_unit = unit
        self._sharing: Sharing | None = None
        if copying.offload is not False and copying.salvage is None and not copying.compress:
            from diskwright.operations.sharing import Sharing

            self._sharing = Sharing(target, kernel_copies=bool(copying.offload), copied=self.copied)
        nodes = [*source.nodes, target]
        total: int | Callable[[], int] = self._work
        if copying.salvage is not None and steering.progress is not None:
            total = self._work()  # which warns of what cannot be told before a byte is copied
        self.workers = Workers(steering, total, computes=encoder is not None, nodes=nodes)

    def run(self) -> None:
        """Copy everything."""
        self.workers.run(self._jobs(), self._worker)

    def _needs_work(self, kind: int) -> bool:
        """Whether a run of this kind leads to a write."""
        stays = self.copying.target_is_zero and self.copying.sparse_bytes
        return kind != SKIP and not (kind == ZERO and stays)

    def _work(self) -> int:
        """Bytes in all runs that need work: what progress is measured by."""
        return sum(piece.length for piece in self._pieces() if self._needs_work(piece.kind))

    def _pieces(self) -> Iterator[Piece]:
        """The source's pieces; an error in finding one says where."""
        end, salvages = 0, self.copying.salvage is not None
        try:
            for piece in self.source.pieces(self._unmapped if salvages else None):
                end = piece.offset + piece.length
                yield piece
        except DiskwrightError as error:
            place = self.source.within(end)
            raise located(error, f"error while reading block status at offset {place}") from error

    def _unmapped(self, offset: int, error: DiskwrightError) -> None:
        """Tell of it; what is encoded is read by the unit, and QEMU asks at its beginning."""
        asked = self.encoder is None or not offset % self.encoder.unit
        if self.copying.unmapped is not None and asked:
            self.copying.unmapped(offset, error)

    def _jobs(self) -> Iterator[Job]:
        """Windows that need work, numbered."""
        number = 0
        stores_zeroes = not self.copying.sparse_bytes
        pieces: Iterator[Piece] = self._announced(self._pieces())
        if self.encoder is not None:
            pieces = whole_units(pieces, self.encoder.unit)
        for window in windows(pieces, self._window_now):
            kind = window.kind
            if not self._needs_work(kind):
                if kind == ZERO:
                    self.copied.count(zero=window.length)
                continue
            parts: Iterable[Window] = (window,)
            if kind == ZERO and stores_zeroes:
                parts = _cut(window, self.window)
            for part in parts:
                yield number, part
                number += 1

    def _announced(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The pieces; the workers learn how long those are that need work."""
        for piece in pieces:
            if self._needs_work(piece.kind):
                self.workers.part_ends(piece.length)
            yield piece

    def _window_now(self) -> int:
        """Longer windows once it is known that blocks are shared."""
        if self._sharing is not None and self._sharing.works:
            return max(self.window, SHARED_WINDOW // self.window * self.window)
        return self.window

    def _worker(self) -> Callable[[Job], None]:
        """What copies one window, with its buffer."""
        view = memoryview(_buffer(self.window))

        def act(job: Job) -> None:
            number, window = job
            worked = sum(one.length for one in window.pieces if self._needs_work(one.kind))
            try:
                self._copy_window(number, window, view)
                self.sink.end(number)
            except BaseException:
                self.sink.stop()
                raise
            self.workers.advance(worked, worked)

        return act

    def _copy_window(self, number: int, window: Window, view: memoryview) -> None:
        pieces = window.pieces
        if self._sharing is not None and not self._sharing.hopeless:
            pieces = self._sharing.rest(pieces)
        parts: Iterable[Window] = (Window(window.offset, window.length, pieces),)
        if window.length > self.window:
            parts = windows(pieces, lambda: self.window)
        for part in parts:
            for stretch in _stretches(self._cut_zeroes(part.pieces), self._apart):
                end = stretch[-1].offset + stretch[-1].length
                self._copy_stretch(number, stretch, view, ends=end == window.offset + window.length)

    def _cut_zeroes(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces, those of known zeroes cut where the target can leave out whole ones."""
        unit = self._zero_unit
        for piece in pieces:
            stop = piece.offset + piece.length
            first, last = -(-piece.offset // unit) * unit, stop // unit * unit
            if piece.kind != ZERO or first >= last:
                yield piece
                continue
            for start, end in ((piece.offset, first), (first, last), (last, stop)):
                if start < end:
                    yield piece.part(start, end - start)

    def _apart(self, piece: Piece) -> bool:
        """Whether a run is known to be zero and can be left out whole."""
        unit = self._zero_unit
        whole = not piece.offset % unit and not piece.length % unit
        return piece.kind == ZERO and whole and bool(self.copying.sparse_bytes)

    def _copy_stretch(
        self, number: int, pieces: list[Piece], view: memoryview, *, ends: bool
    ) -> None:
        """Neighbouring pieces without a gap; whether the window ends with them."""
        start, last = pieces[0].offset, pieces[-1]
        length = last.offset + last.length - start
        if len(pieces) == 1 and last.kind == ZERO and self.copying.sparse_bytes:
            self.sink.write_zeroes(start, length)
            return
        part = view[:length]
        for piece in pieces:
            at = piece.offset - start
            into = part[at : at + piece.length]
            if piece.kind == DATA:
                self._read(piece, into)
            else:
                into[:] = bytes(piece.length)
        self.sink.write(number, start, part, last=ends)

    def _read(self, piece: Piece, view: memoryview) -> None:
        offset = piece.offset
        try:
            self.source.read_piece(piece, view)
        except DiskwrightError as error:
            if self.copying.salvage is None:
                raise located(error, f"error while reading at byte {offset}") from error
            self._salvage(offset, view)

    def _salvage(self, offset: int, view: memoryview) -> None:
        """Read sector by sector; what cannot be read becomes zero."""
        assert self.copying.salvage is not None
        for start in range(0, len(view), SECTOR):
            part = view[start : start + SECTOR]
            try:
                self.source.read_into(offset + start, part)
            except DiskwrightError as error:
                part[:] = bytes(len(part))
                self.copied.count(salvaged=len(part))
                self.copying.salvage(self.source.within(offset + start), error)


def zero_unit(target: Node, copying: Copying) -> int:
    """What the target leaves out is whole pieces of this length, where known to be zero."""
    wanted = 0 if copying.compress else min(_power(copying.sparse_bytes) or FINEST, FINEST)
    return max(wanted, SECTOR, target.limits.zero_alignment)


def look_unit(copying: Copying, unit: int) -> int:
    """The pieces in which zeroes are looked for: not shorter than what is worth a hole.

    They begin at multiples of their length, as with QEMU's tool. What is encoded is left out by
    the unit, however short.
    """
    worth = 0 if copying.compress else copying.sparse_bytes
    return max(unit, _power(worth))


def _power(length: int) -> int:
    """The power of two that is not above `length`; 0 for 0."""
    return 1 << length.bit_length() - 1 if length else 0


def _buffer(length: int) -> mmap:
    """A buffer of whole pages: direct I/O takes it, and the system copies it fastest."""
    from mmap import mmap

    return mmap(-1, length)


def _stretches(pieces: Iterable[Piece], apart: Callable[[Piece], bool]) -> Iterator[list[Piece]]:
    """Neighbours between gaps; pieces that stand apart are alone."""
    stretch: list[Piece] = []
    for piece in pieces:
        alone = piece.kind != SKIP and apart(piece)
        if (alone or piece.kind == SKIP) and stretch:
            yield stretch
            stretch = []
        if alone:
            yield [piece]
        elif piece.kind != SKIP:
            stretch.append(piece)
    if stretch:
        yield stretch


def _cut(window: Window, length: int) -> Iterator[Window]:
    """A long window of one piece in short ones."""
    stop = window.offset + window.length
    for start in range(window.offset, stop, length):
        part = min(length, stop - start)
        yield Window(start, part, [window.pieces[0].part(start, part)])
