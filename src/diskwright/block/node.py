"""Node: something with a size whose bytes can be read, and perhaps written.

Public operations are final. Each passes the graph's gate, checks range, permission and state
once, and calls one hook with good arguments. A driver overrides hooks (their names begin
with an underscore) and contains nothing else.

The two hottest operations, `read` and `write`, go from here straight to the descriptor that
the file node lent (`_attach_lent`), where `locate` says that the bytes lie plainly in it.
"""

from __future__ import annotations

import os
from _thread import allocate_lock, get_ident
from itertools import islice

from diskwright.block import requests
from diskwright.block.cancel import check_cancelled
from diskwright.block.debugging import Debugging
from diskwright.block.extent import DATA, READS_ZERO, Extent, joined
from diskwright.block.graph import Graph
from diskwright.block.inflight import Joined, RangeLocks
from diskwright.block.lifetime import Lifetime
from diskwright.block.limits import Limits
from diskwright.block.management import Management
from diskwright.block.options import Options
from diskwright.block.permission import default_permissions
from diskwright.errors import DiskwrightError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from diskwright.block.bitmap import DirtyBitmap
    from diskwright.block.child import Child
    from diskwright.block.info import NodeInfo
    from diskwright.block.mapping import Encoder
    from diskwright.block.opener import Opener
    from diskwright.block.stream import NodeFile

    Bytes = bytes | bytearray | memoryview

_pread = os.pread if hasattr(os, "pread") else None
_pwrite = os.pwrite if hasattr(os, "pwrite") else None

#: How much of a node one step of an outside `extents` walk looks at inside the gate: so many bytes,
#: twice as many as before after a step with few runs, and no more runs than this.
EXTENT_WINDOW, FEW_RUNS, EXTENT_RUNS = 1 << 30, 64, 1 << 16


class Node(Lifetime, Management, Debugging):
    """A node of the graph; see the module's text and docs/explanation/graph.md.

    Attributes:
        size: in bytes; set by `_open` and `_truncate`.
        limits: what requests need no padding.
        children: name -> Child, in the order of attachment.
        parents: the edges that use this node, those of outside users included.
        read_only: no write will be accepted.
        broken: why metadata can not be trusted any more, or None.
        data_child: the child that `locate` speaks of.
    """

    driver = ""
    is_protocol = False
    is_remote = False  # of a protocol: each request waits for another program's answer
    is_filter = False
    supports_fua = False
    #: a filter that makes other bytes of its child's: nobody may go around it
    changes_bytes = False
    options = Options()
    create_options = Options()
    event_hook: Callable[[str], None] | None = None

    def __init__(self, graph: Graph, node_name: str) -> None:
        self.graph = graph
        self.node_name = node_name
        self.filename = ""
        self.opened_options: dict[str, object] = {}
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.read_only = True
        self.commits = False  # it is written down into its backing file at this moment
        self.keeps_content = False  # what is written now changes nothing that overlays show
        self.can_unmap = True  # discards are passed on (the option discard=unmap)
        self.protocol_level = False  # opened where a protocol was expected
        self.probed = False  # the format was guessed from the image's bytes
        self.closed = False
        self.broken: str | None = None
        self.broken_kind = "broken"  # of the errors then
        self.size = 0
        self.limits = Limits()
        self.detect_zeroes = ""
        self.copy_on_read = False  # what is read from the backing file is kept here
        self.write_through = False
        self.unflushed = False
        self.watching: tuple[DirtyBitmap, ...] = ()  # note what is written
        self.data_child: Child | None = None
        self.ranges = RangeLocks()  # of requests that allocate, zero, discard, populate
        # of writes to a node that pads; taken before `ranges`; QEMU's wait for each other so, too
        self.pads = RangeLocks(overtaking=True)
        self.size_lock = allocate_lock()
        self._flush_joined = Joined(self._flush_once)
        self._fd = -1  # lent for reading; -1: none
        self._write_fd = -1  # lent for writing in place
        self._base = 0
        self._lender: Node = self
        self._born()

    # ------------------------------------------------------------------ reading and writing

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset + length).

        Raises:
            RangeError: the range reaches outside of the node.
            IOFailure: the system could not read.
        """
        graph = self.graph
        inside = graph.inside
        me = get_ident()
        if me in inside:
            return self._read_checked(offset, length)
        inside[me] = graph.epoch
        try:
            if graph.closed:
                graph = graph.wait_in(me)  # type: ignore[assignment]
            if offset >= 0 and offset + length <= self.size and self._fd >= 0 and length > 0:
                host = self.locate(offset, length)
                if host >= 0:
                    data = _pread(self._fd, length, host + self._base)  # type: ignore[misc]
                    if len(data) == length:
                        return data
                elif host == READS_ZERO:
                    return bytes(length)
            return self._read_checked(offset, length)
        except OSError as error:
            raise self.failure(error, "Could not read") from error
        finally:
            del graph.inside[me]
            if graph.closed:
                graph.left()

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer`, any writable object with the buffer protocol, from `offset`.

        Raises: as `read`.
        """
        view = memoryview(buffer)
        if view.format != "B" or view.ndim != 1 or not view.contiguous:
            view = view.cast("B")
        with self.graph.request():
            self._check_open()
            length = len(view)
            requests.check_range(self, offset, length)
            if self._fd >= 0 and length:
                host = self.locate(offset, length)
                try:
                    if host >= 0 and os.preadv(self._fd, [view], host + self._base) == length:
                        return
                except OSError as error:
                    raise self.failure(error, "Could not read") from error
            requests.read_checked(self, offset, view)

    def _read_checked(self, offset: int, length: int) -> bytes:
        self._check_open()
        requests.check_range(self, offset, length)
        buffer = bytearray(length)
        requests.read_checked(self, offset, memoryview(buffer))
        return bytes(buffer)

    def write(self, offset: int, data: Bytes, *, fua: bool = False) -> None:
        """Write `data` at `offset`; it is durable after `flush`, or at once with `fua`.

        Raises:
            RangeError: the range reaches outside of the node.
            ReadOnlyError, BrokenNodeError: the node takes no writes.
            NoSpaceError, IOFailure: the system could not write; nothing else was changed.
        """
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1 or not view.contiguous:
            view = view.cast("B")
        length = len(view)
        graph = self.graph
        inside = graph.inside
        me = get_ident()
        if me in inside:
            self._write_checked(offset, view, fua)
            return
        inside[me] = graph.epoch
        try:
            if graph.closed:
                graph = graph.wait_in(me)  # type: ignore[assignment]
            inside_node = offset >= 0 and offset + length <= self.size
            if self._write_fd >= 0 and inside_node and length and not fua:
                host = self.locate(offset, length, write=True)
                if host >= 0:
                    try:
                        count = _pwrite(self._write_fd, view, host + self._base)  # type: ignore[misc]
                    finally:
                        self._lender.unflushed = True
                    if count == length:
                        return
            self._write_checked(offset, view, fua)
        except OSError as error:
            raise self.failure(error, "Could not write") from error
        finally:
            del graph.inside[me]
            if graph.closed:
                graph.left()

    def _write_checked(self, offset: int, view: memoryview, fua: bool) -> None:
        self._check_open()
        requests.check_range(self, offset, len(view))
        requests.write_checked(self, offset, view, fua)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        unmap: bool = False,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Make [offset, offset + length) read as zero.

        Args:
            offset, length: in bytes, inside of the node.
            unmap: space may be given back.
            fast: refuse (UnsupportedError) rather than write zeroes out.
            fua: durable on return.
        """
        with self.graph.request():
            self._check_open()
            requests.check_range(self, offset, length)
            flags = requests.zero_flags(unmap, fast, fua)
            requests.zero_checked(self, offset, length, flags)

    def write_encoded(self, offset: int, payload: Bytes, length: int) -> None:
        """Store `payload`, which the node's `encoder` made of one unit at `offset`.

        Args:
            offset: in bytes, of a unit.
            payload: as `encode` returned it.
            length: the unit's; less, or what reaches past the end, only at the node's end.

        Raises:
            RangeError: that is no unit of the node.
            UnsupportedError: the node stores nothing encoded.
        """
        with self.graph.request():
            self._check_open()
            requests.check_writable(self)
            requests.check_unit(self, offset, length)
            self.before_write()
            try:
                self._write_encoded(offset, memoryview(payload), length)
            finally:
                requests.note(self, offset, length)
            if self.write_through:
                self.flush_inside()

    def discard(self, offset: int, length: int) -> None:
        """Say that the content of the range is not needed; what it reads as is open."""
        with self.graph.request():
            self._check_open()
            requests.check_range(self, offset, length)
            requests.discard_checked(self, offset, length)

    def populate(self, offset: int, length: int) -> None:
        """Bring what is unallocated here up from the backing file, never over newer data."""
        requests.populate(self, offset, length)

    def flush(self) -> None:
        """Make all that was written before this call durable.

        Raises:
            IOFailure: it may not be; the node refuses writes until it is reopened.
        """
        with self.graph.request():
            self._check_open()
            self.flush_inside()

    def extents(self, offset: int, length: int, *, depth: int | None = None) -> Iterator[Extent]:
        """What each run of the range is, in order and without gaps.

        Args:
            offset, length: in bytes, inside of the node.
            depth: how many backing files to look through: 0 for this layer alone, None for all.
        """
        found = self._walk(offset, length, lambda at, n: requests.walk_extents(self, at, n, depth))
        return joined(found)

    def resolve(self, offset: int, length: int) -> Iterator[Extent]:
        """As `extents` of this layer, with host offsets in the bottom protocol node."""
        found = self._walk(offset, length, lambda at, n: requests.bottom_extents(self, at, n))
        return joined(found)

    def _walk(
        self, offset: int, length: int, ask: Callable[[int, int], Iterator[Extent]]
    ) -> Iterator[Extent]:
        requests.check_range(self, offset, length)
        position, stop, window = offset, offset + length, EXTENT_WINDOW
        while position < stop:
            check_cancelled()
            found: list[Extent] = []  # with what comes before an error, too
            try:
                with self.graph.request():
                    self._check_open()
                    inside = min(window, min(stop, self.size) - position)
                    found.extend(islice(ask(position, inside), EXTENT_RUNS))
            except DiskwrightError:
                yield from found
                raise
            position = found[-1].end if found else stop  # it may be shorter now
            window = window * 2 if len(found) <= FEW_RUNS else EXTENT_WINDOW
            yield from found

    def as_file(self) -> NodeFile:
        """The node as an `io.RawIOBase`; closing it leaves the node open."""
        from diskwright.block.stream import NodeFile

        return NodeFile(self)

    # -------------------------------------------------------------------------- capabilities

    @property
    def unfiltered(self) -> Node:
        """The node itself, or what a filter, or one above another, lies over."""
        return self

    @property
    def backing(self) -> Child | None:
        """The child that shows through where this layer has nothing."""
        return self.children.get("backing")

    @property
    def has_zero_init(self) -> bool:
        """Whether a node just created reads as zero everywhere."""
        return False

    @property
    def can_discard(self) -> bool:
        """Whether discard gives space back."""
        return not self.read_only and type(self)._discard is not Node._discard

    @property
    def can_zero(self) -> bool:
        """Whether zeroes need not be written out."""
        return not self.read_only and type(self)._write_zeroes is not Node._write_zeroes

    @property
    def can_place(self) -> bool:
        """Whether `place` hands out host space."""
        return False

    @property
    def shows_holes(self) -> bool:
        """Whether data may lie over holes of the file, so that `map` looks there for zeroes."""
        return False

    @property
    def can_resize(self) -> bool:
        """Whether `truncate` is implemented."""
        return type(self)._truncate is not Node._truncate

    @property
    def can_grow(self) -> bool:
        """Whether it gets longer where more is written: the end of a device stays where it is."""
        return self.can_resize

    def encoder(self) -> Encoder | None:
        """What makes payloads for `write_encoded`, or None."""
        return None

    @classmethod
    def encodes(cls) -> bool:
        """Whether images of this driver can have encoded units."""
        return cls.encoder is not Node.encoder

    # -------------------------------------------------------------------------- inside the gate

    def flush_inside(self) -> None:
        """`flush` for those who are inside already."""
        requests.check_trusted(self)
        if self.is_protocol:
            if not self.unflushed and not self._flush_joined.running:
                return
            self._flush_joined()
        elif not self.read_only:
            self._flush()

    def _flush_once(self) -> None:
        requests.check_trusted(self)
        self.unflushed = False
        try:
            self._flush()
        except BaseException as error:
            self.unflushed = True
            self.break_off(f"a flush failed ({error})")
            raise

    def break_off(self, reason: str) -> None:
        """Take no more writes, here and in what is stored here, until it is reopened."""
        self.broken = self.broken or reason
        self._write_fd = -1
        for edge in list(self.parents):
            if edge.parent is not None and edge.name != "backing":
                edge.parent.break_off(reason)

    def before_write(self) -> None:
        """What must be durable before the first changed byte; mapped formats have such."""

    def written(self, stop: int) -> None:
        """Note that something was written, up to byte `stop`."""
        if self.is_protocol:
            self.unflushed = True
            if stop > self.size:
                with self.size_lock:
                    self.size = max(self.size, stop)
        elif self.is_filter and stop > self.size:
            self.size = stop

    def size_changed(self) -> None:
        """Tell the parents that cache something of this node's size."""
        for edge in self.parents:
            if edge.parent is not None:
                edge.parent._child_resized(edge)

    def reach(self, stop: int) -> None:
        """Be long enough for bytes up to `stop`, which are written around this node."""
        requests.grow(self, stop, "off")

    def refresh_size(self) -> None:
        """Look at the outside's size again; protocol nodes whose size can change override."""

    def aligned_buffer(self, length: int) -> memoryview:
        """A buffer as direct I/O on this node wants it (page aligned where it matters)."""
        if self.limits.memory_alignment > 1:
            import mmap

            return memoryview(mmap.mmap(-1, length))
        return memoryview(bytearray(length))

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Where all of [offset, offset + length) lies plainly in `data_child`, or -1.

        READS_ZERO: nowhere, and it reads as zero; not with `write`. Never waits, and may answer
        -1 at any time; with `write`, overwriting must be right.
        """
        return -1

    def describe(self) -> str:
        """The node in a sentence."""
        return f"'{self.filename}'" if self.filename else self.node_name

    def failure(self, error: OSError, sentence: str) -> DiskwrightError:
        """The error of our tree for a system call's on this node."""
        from diskwright.errors import from_oserror

        return from_oserror(error, f"{sentence} {self.describe()}", path=self.filename)

    def _check_open(self) -> None:
        if self.closed:
            why = f": {self.broken}" if self.broken else ""
            raise UnsupportedError(
                f"{self.describe()} is closed{why}", kind="closed", node=self.node_name
            )

    def _attach_lent(self) -> None:
        """Take the descriptor that the data child's file lends; under exclusive or at open."""
        self._fd = self._write_fd = -1
        lender: Node = self
        while lender.data_child is not None:
            lender = lender.data_child.node
        source = self if self.data_child is None else self.data_child.node
        around = self.changes_bytes or self.copy_on_read or self.limits.request_alignment > 1
        lent = None if around else source.lend()
        if lent is None or _pread is None:
            return
        self._lender = lender
        self._fd, self._base = lent
        self._arm_writes()

    def _arm_writes(self) -> None:
        """Let `write` go straight to the lent descriptor, where nothing stands against it."""
        plain = not (self.read_only or self.broken or self.detect_zeroes or self.write_through)
        plain = plain and not (self.watching or self._lender.detect_zeroes)
        self._write_fd = self._fd if plain and self._may_write_around() else -1

    def lend(self) -> tuple[int, int] | None:
        """The descriptor of the file that has the node's bytes as they are, and their offset.

        None where there is no such file, or where a bitmap must see each write.
        """
        return None if self.watching else self._lend()

    def _may_write_around(self) -> bool:
        """Whether writes may skip the hook at this moment."""
        return True

    # ------------------------------------------------------------------------------ hooks

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        raise UnsupportedError(f"{self.driver} cannot be opened")

    def _read_into(self, offset: int, view: memoryview) -> None:
        raise UnsupportedError(f"{self.driver} cannot be read")

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        raise UnsupportedError(f"{self.driver} cannot be written")

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        raise UnsupportedError(f"{self.driver} has no fast way to zero")

    def _write_encoded(self, offset: int, payload: memoryview, length: int) -> None:
        raise UnsupportedError(f"{self.driver} stores nothing compressed")

    def _discard(self, offset: int, length: int) -> None:
        return

    def _read_ahead(self, offset: int, length: int) -> None:
        """Have a range of a protocol's bytes brought near, if there is a way to."""

    def _populate(self, offset: int, length: int, zeroes: bool) -> None:
        raise UnsupportedError(f"{self.driver} cannot copy from its backing file")

    def _flush(self) -> None:
        self.tell("flush_to_os", "flush_to_disk")
        for child in self.children.values():
            if not child.node.read_only:
                child.flush()

    def _extents(self, offset: int, length: int) -> Iterable[Extent]:
        return [Extent(offset, length, DATA)]

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        raise UnsupportedError(
            f"{self.describe()} cannot be resized",
            qemu="Image format driver does not support resize",
        )

    def _prepare_resize(self, size: int) -> None:
        return

    def _lend(self) -> tuple[int, int] | None:
        return None

    def _permissions_changed(self, used: int, shared: int) -> None:
        return

    def _child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return default_permissions(
            child.role, used, shared, read_only=self.read_only, commits=self.commits
        )

    def _child_resized(self, child: Child) -> None:
        return

    def _after_fork(self) -> None:
        """Be usable without the threads that held locks as the process was forked."""
        self.size_lock = allocate_lock()

    def _finish(self) -> None:
        """What a clean end writes; called under exclusive before the children close."""

    def _close(self) -> None:
        return

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """The options that `scheme:rest` stands for, for drivers that have a scheme."""
        return {"filename": name.partition(":")[2]}

    @classmethod
    def probe(cls, head: bytes, size: int, filename: str) -> int:
        """How sure the driver is that an image that begins with `head` is its own, 0 to 100."""
        return 0

    @classmethod
    def probe_end(cls, end: bytes, size: int) -> bool:
        """Whether `end`, the last sector of `size` bytes, is one that only its images have."""
        return False

    @classmethod
    def glimpse(cls, file: Child) -> NodeInfo:
        """What an image's header says, for one that cannot be opened; follows nothing."""
        raise UnsupportedError(f"The header of a {cls.driver} image says nothing by itself")

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """Make a new image of `size` bytes; `options` are validated `create_options`."""
        raise UnsupportedError(
            f"Format driver '{cls.driver}' does not support image creation", field="driver"
        )
