"""The public operations of a node beside reading and writing: its size, its description,
its consistency, its snapshots, its backing file. Each is final and calls one hook.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.graph import refresh_permissions
from diskwright.block.info import CheckResult, Content, Measured, NodeInfo, Repair, SnapshotInfo
from diskwright.block.options import Options
from diskwright.block.permission import RESIZE
from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from diskwright.block.bitmap import BitmapInfo, BitmapStore, DirtyBitmap
    from diskwright.block.graph import Graph
    from diskwright.block.node import Node
    from diskwright.block.reopen import Finish, Reopening


class Management:
    """Mixed into Node, which has the attributes declared here."""

    driver = ""
    #: QEMU has no check for this format: commands that answer as QEMU does say so
    check_beyond_qemu = False
    #: create option that names a backing file, for a format in which QEMU knows none; the file is
    #: an image of this format, and the new image has its size
    parent_option = ""
    #: what `amend` may change; none where it cannot
    amend_options = Options()
    #: its images may have a backing file, which options of the child "backing" can be given for
    takes_backing = False
    #: a storage of which there is no folder that names could be relative to: QEMU's sentence
    no_folder = ""
    if TYPE_CHECKING:
        graph: Graph
        node_name: str
        size: int
        read_only: bool

        def _check_open(self) -> None: ...
        def describe(self) -> str:
            """See Node."""

        def before_write(self) -> None:
            """See Node."""

        def flush_inside(self) -> None:
            """See Node."""

        def size_changed(self) -> None:
            """See Node."""

    @classmethod
    def check_place(cls, options: dict[str, object]) -> None:
        """Refuse a place, of a protocol's options, where nothing can be made; nothing is made."""

    # ------------------------------------------------------------------------------ public

    def reserve_space(self, offset: int, length: int) -> None:
        """Have the outside keep space for bytes that come later, where it can; no byte changes.

        Raises:
            NoSpaceError: it has none.
        """

    def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the size; what is added reads as zero.

        Args:
            size: in bytes.
            exact: where False, a device that is longer than asked is good enough.
            preallocation: "off", "metadata", "falloc" or "full", for what is added.

        Raises:
            UnsupportedError: the format cannot be resized, or not so.
        """
        with self.graph.exclusive():
            self._check_open()
            requests.check_writable(_node(self))
            if not _node(self).can_resize:
                _node(self)._truncate(size, exact, preallocation)  # refuses
            with _Resizing(_node(self)):
                requests.truncate_checked(_node(self), size, exact, preallocation)

    def info(self) -> NodeInfo:
        """What the node says of itself."""
        with self.graph.request():
            self._check_open()
            return self._info()

    def check(
        self,
        repair: int = Repair.NONE,
        report: Callable[[str], None] | None = None,
    ) -> CheckResult:
        """Count what is inconsistent in the image's metadata, and perhaps repair it.

        Args:
            repair: what may be changed; anything but NONE needs a writable node.
            report: gets a line for each thing found, in QEMU's words.

        Raises:
            UnsupportedError: the format has no metadata to check.
        """
        with self.graph.exclusive():
            self._check_open()
            self.settle()
            if repair != Repair.NONE:
                requests.check_writable(_node(self))
                self.before_repair()
            return self._check(repair, report or _ignore)

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots, in the image's order."""
        with self.graph.request():
            self._check_open()
            return self._snapshots()

    def snapshot_create(self, wanted: SnapshotInfo) -> SnapshotInfo:
        """Keep the present content as a snapshot; an empty id is chosen by the format."""
        if "\0" in wanted.name:
            raise OptionError("A snapshot's name cannot have a zero byte in it", field="name")
        with self.graph.exclusive():
            self.check_snapshots()
            self._begin_change()
            return self._snapshot_create(wanted)

    def check_snapshots(self) -> None:
        """Refuse what can neither take a snapshot nor go back to one, as QEMU does.

        Raises:
            UnsupportedError: why.
        """

    def snapshot_apply(self, identifier: str) -> None:
        """Make the present content that of the snapshot with this id or else name."""
        with self.graph.exclusive():
            self.check_snapshots()
            self._begin_change()
            self._snapshot_apply(identifier)
            self.size_changed()

    def snapshot_delete(self, identifier: str) -> None:
        """Remove the snapshot with this id or else name."""
        with self.graph.exclusive():
            self._begin_change()
            self._snapshot_delete(identifier)

    def dirty_bitmaps(self) -> list[BitmapInfo]:
        """The dirty bitmaps in the image, in its order."""
        with self.graph.request():
            self._check_open()
            store = self._bitmap_store()
            return [] if store is None else [one.info() for one in store.bitmaps.values()]

    def dirty_bitmap(self, name: str) -> DirtyBitmap:
        """A dirty bitmap and its bits; to be looked at only.

        Raises:
            NotFoundError: there is none of this name.
            UnsupportedError: it is inconsistent.
        """
        with self.graph.exclusive():
            self._check_open()
            return self._needed(self._bitmap_store()).content(name)

    def bitmap_add(
        self, name: str, *, granularity: int | None = None, enabled: bool = True
    ) -> None:
        """Begin a dirty bitmap in the image, durable on return.

        Args:
            name: of its own.
            granularity: bytes a bit stands for, a power of two; None: as the clusters.
            enabled: it notes writes.

        Raises:
            OptionError: the name is taken, or the granularity is none.
            UnsupportedError: the image cannot have it.
        """
        from diskwright.block.bitmap import new_bitmap, no_store

        def add(store: BitmapStore | None) -> None:
            made = new_bitmap(_node(self), name, granularity, enabled=enabled)
            if store is None:
                raise no_store(_node(self), name)
            store.add(made)

        self._change_bitmaps(add)

    def bitmap_remove(self, name: str) -> None:
        """Drop a dirty bitmap, be it inconsistent; as `dirty_bitmap` else."""
        self._change_bitmaps(lambda store: self._needed(store).remove(name))

    def bitmap_clear(self, name: str) -> None:
        """Let a dirty bitmap forget what it has noted; as `dirty_bitmap` else."""
        self._change_bitmaps(lambda store: self._needed(store).clear(name))

    def bitmap_enable(self, name: str, enabled: bool = True) -> None:
        """Let a dirty bitmap note writes, or stop; as `dirty_bitmap` else."""
        self._change_bitmaps(lambda store: self._needed(store).enable(name, enabled))

    def bitmap_merge(self, name: str, source: DirtyBitmap) -> None:
        """Note in a dirty bitmap what `source` has noted, of any node; as `dirty_bitmap` else.

        Raises:
            OptionError: it is of a disk of another size.
        """
        self._change_bitmaps(lambda store: self._needed(store).merge(name, source))

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Write another backing file's name into the image; opens and copies nothing."""
        if "\0" in (name or "") + (format or ""):
            raise OptionError("A backing file's name cannot have a zero byte in it", field="name")
        with self.graph.exclusive():
            self._begin_change()
            self._change_backing(name, format)

    def amend(
        self, options: Mapping[str, object], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Change what the image was made with; what it reads stays the same.

        Args:
            options: names of `amend_options` and values, those that are to change.
            progress: called with (steps done, steps in all).

        Raises:
            UnsupportedError: the format has nothing to amend, or not so.
            OptionError: a value is impossible.
        """
        with self.graph.exclusive():
            self._begin_change()
            with _Resizing(_node(self)):
                self._amend(options, progress or (lambda done, total: None))
            self.size_changed()

    def make_empty(self) -> None:
        """Drop all of this layer's content, so that the backing file shows through."""
        with self.graph.exclusive():
            self._begin_change()
            self._make_empty()

    def reopen(
        self,
        *,
        read_only: bool | None = None,
        cache: str | None = None,
        share_writes: bool = False,
        **options: object,
    ) -> None:
        """Change how the node is open, without a moment in which it is not.

        Args:
            read_only: whether writes are refused; None leaves it. A node that becomes writable
                lets nobody else write.
            cache: another cache mode; None leaves it.
            share_writes: others may write nevertheless, as they may beside QEMU's tools.
            options: of the driver, or common ones (`discard`, `detect_zeroes`, those of the
                cache), with underscores where the names have hyphens.

        Raises:
            LockError, AccessError: it cannot be had; the node is as it was.
            UnsupportedError: the driver cannot change that, or another node uses this one.
        """
        from diskwright.block.reopen import Reopening, reopen_with

        given = {name.replace("_", "-"): value for name, value in options.items()}
        wanted = Reopening.to(read_only=read_only, cache=cache)
        wanted.share_writes = share_writes
        reopen_with(_node(self), wanted, given)

    @classmethod
    def measure(cls, content: Content, options: dict[str, object]) -> Measured:
        """How long the file of a new image with this content would be.

        Args:
            content: what it is to hold.
            options: validated `create_options`.

        Raises:
            UnsupportedError: the format cannot say.
        """
        raise UnsupportedError(f"Block driver '{cls.driver}' does not support size measurement")

    def write_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole units, each compressed where that makes it shorter.

        Args:
            offset: in bytes, of a unit of the node's encoder.
            data: of whole units; the last one may end with the node.

        Raises:
            UnsupportedError: the format stores nothing compressed.
            OptionError: those are no whole units.
            IOFailure: there is something already: as in QEMU, what is compressed replaces nothing.
        """
        from diskwright.block.compressed import write_compressed

        with self.graph.request():
            self._check_open()
            write_compressed(_node(self), offset, memoryview(data).cast("B"))

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """Bytes of the machine's state that the image keeps beside the disk.

        Raises:
            UnsupportedError: the format keeps none.
        """
        view = memoryview(bytearray(length))
        with self.graph.request():
            self._check_open()
            if length:
                self._read_vm_state(offset, view)
        return bytes(view)

    def write_vm_state(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the machine's state that the image keeps beside the disk.

        Raises:
            UnsupportedError: the format keeps none.
        """
        view = memoryview(data).cast("B")
        with self.graph.exclusive():
            self._begin_change()
            if len(view):
                self._write_vm_state(offset, view)

    # ------------------------------------------------------------------------------ inside

    def _begin_change(self) -> None:
        self._check_open()
        requests.check_writable(_node(self))
        self.settle()
        self.before_write()

    def _change_bitmaps(self, change: Callable[[BitmapStore | None], None]) -> None:
        """The guest's data stay as they are."""
        with self.graph.exclusive():
            self._check_open()
            requests.check_writable(_node(self))
            store = self._bitmap_store()
            if store is not None:
                self.settle()
                self.before_repair()
            change(store)

    def watch(self, bitmaps: Iterable[DirtyBitmap]) -> None:
        """Let `bitmaps`, and no others, note what is written; before a first write, or alone."""
        node = _node(self)
        node.watching = tuple(bitmaps)
        node._arm_writes()
        for edge in node.parents:
            if edge.parent is not None:
                edge.parent._attach_lent()

    def _needed(self, store: BitmapStore | None) -> BitmapStore:
        """The store, or one without bitmaps, which says so."""
        from diskwright.block.bitmap import BitmapStore

        return store or BitmapStore(_node(self), ())

    def settle(self) -> None:
        """Bring the node to rest, under exclusive: nothing dirty, nothing retired."""

    def require(self, what: str) -> UnsupportedError:
        """The error for something that this format does not have."""
        return UnsupportedError(
            f"{self.describe()}: the {self.driver} format has no {what}",
            node=self.node_name,
        )

    def before_repair(self) -> None:
        """What must be durable before a repair changes metadata; the content stays as it is."""
        self.before_write()

    # ------------------------------------------------------------------------------ hooks

    def _info(self) -> NodeInfo:
        """Without tables of its own, a node is as what lies below it."""
        below = [child.node._info() for child in _node(self).children.values()]
        return NodeInfo(
            self.driver,
            self.size,
            cluster_size=below[0].cluster_size if below else None,
            dirty=None if below and below[0].dirty is None else False,
        )

    def _read_vm_state(self, offset: int, view: memoryview) -> None:
        raise self.require("state of a machine")

    def _write_vm_state(self, offset: int, view: memoryview) -> None:
        raise self.require("state of a machine")

    def _check(self, repair: int, report: Callable[[str], None]) -> CheckResult:
        raise UnsupportedError("This image format does not support checks")

    def _snapshots(self) -> list[SnapshotInfo]:
        return []

    def _snapshot_create(self, wanted: SnapshotInfo) -> SnapshotInfo:
        raise self.require("internal snapshots")

    def _snapshot_apply(self, identifier: str) -> None:
        raise self.require("internal snapshots")

    def _snapshot_delete(self, identifier: str) -> None:
        raise self.require("internal snapshots")

    def _bitmap_store(self) -> BitmapStore | None:
        """What keeps the image's bitmaps; None: it can have none."""
        return None

    def _change_backing(self, name: str | None, format: str | None) -> None:
        raise self.require("backing file")

    def _amend(self, options: Mapping[str, object], progress: Callable[[int, int], None]) -> None:
        raise UnsupportedError(
            f"{_node(self).driver} images have nothing to amend",
            qemu=f"Format driver '{_node(self).driver}' does not support option amendment",
        )

    def _make_empty(self) -> None:
        raise self.require("backing file")

    def _prepare_options(self, options: dict[str, object]) -> Finish:
        """Get ready to change options of the driver; all that can fail, fails here."""
        if options:
            raise UnsupportedError(
                f"The {self.driver} driver cannot change {', '.join(sorted(options))} while it "
                "is open",
                qemu=f"Cannot change the option '{min(options)}'",
                field=min(options),
            )
        return _ignore_outcome

    def _prepare_reopen(self, wanted: Reopening) -> Finish:
        """Get ready for another use of what the node is stored in."""
        return _ignore_outcome

    def _reopened(self) -> None:
        """The node is open in another way now, as are its children."""

    @property
    def allocated_size(self) -> int | None:
        """Bytes that it occupies where it is stored, backing files aside; None: nobody knows."""
        sizes = [
            child.node.allocated_size
            for name, child in _node(self).children.items()
            if name != "backing"
        ]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None

    @property
    def vm_state_offset(self) -> int:
        """Where a machine's state would begin, were it part of the disk; 0: none is kept."""
        return 0

    @property
    def can_check(self) -> bool:
        """Whether there are metadata that `check` looks at."""
        return type(self)._check is not Management._check

    @property
    def can_snapshot(self) -> bool:
        """Whether the format keeps snapshots inside of the image."""
        return type(self)._snapshot_create is not Management._snapshot_create

    @property
    def can_have_backing(self) -> bool:
        """Whether the format can name a backing file."""
        return type(self)._change_backing is not Management._change_backing

    @property
    def can_keep_bitmaps(self) -> bool:
        """Whether the image can have dirty bitmaps in it."""
        return False

    @classmethod
    def keeps_bitmaps(cls) -> bool:
        """Whether there are images of this driver that can."""
        return cls.can_keep_bitmaps is not Management.can_keep_bitmaps


class _Resizing:
    """Lets the node's users from outside resize it for a moment; others may be against it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._edges = [
            edge for edge in node.parents if edge.parent is None and not edge.used & RESIZE
        ]

    def __enter__(self) -> None:
        for edge in self._edges:
            edge.used |= RESIZE
        try:
            refresh_permissions(self._node)
        except BaseException:
            self._give_back()
            raise

    def _give_back(self) -> None:
        for edge in self._edges:
            edge.used &= ~RESIZE

    def __exit__(self, *_: object) -> None:
        if self._edges:
            self._give_back()
            refresh_permissions(self._node)


def _node(managed: Management) -> Node:
    """The node that `managed` is a part of."""
    return managed  # type: ignore[return-value]  # Node is the only subclass


def _ignore(line: str) -> None:
    return


def _ignore_outcome(done: bool) -> None:
    return
