"""Mapped formats, first half: what a driver gives, and the metadata lock around it.

Hooks that change tables run under the lock and do no I/O; freed space waits in retirement
until nobody can be using it; a failed table write breaks the node. The paths of reads and
writes are in mapped.py, whose text lists the invariants.
"""

from __future__ import annotations

from _thread import allocate_lock

from diskwright.block.inflight import Condition, OwnedLock
from diskwright.block.mapping import Allocation, Freed, NeedWork, Run, Unit
from diskwright.block.node import Node
from diskwright.block.table_cache import Slice, TableCache, TableMiss
from diskwright.errors import DiskwrightError, IOFailure, NoSpaceError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from diskwright.block.child import Child
    from diskwright.block.graph import Graph

    T = TypeVar("T")

#: How often others may fill the journal again before a publish gets its turn.
MAX_PUBLISHES = 1000

#: Freed space is looked at again when this many pieces of it wait.
RETIRED_BATCH = 64

#: Tables are written unasked when this many freed bytes wait for them: else a file whose user
#: discards, writes and never flushes would grow while much of it is free.
RETIRED_BYTES = 16 << 20

#: Spans that are remembered to have room, until the hook that wants them is called again.
MAX_HELD_ROOM = 64


class MappedBase(Node):
    """A format whose driver maps; see mapped.py.

    A driver sets in `_open`: size, cluster_size, fill_size (edges are completed to this;
    equals cluster_size unless the format keeps validity in smaller units), data_child, and
    cache where it has tables.
    """

    cluster_size = 0
    fill_size = 0
    has_transform = False
    #: new space of which only a part is written is reserved as a whole, so that it lies together
    reserves_space = False
    #: zeroes that the backing file shows are written all the same: another may be named later
    backing_may_change = False

    def __init__(self, graph: Graph, node_name: str) -> None:
        super().__init__(graph, node_name)
        self.metadata_lock = OwnedLock()
        self.cache: TableCache | None = None
        self.pass_discard = False  # freed space is punched out of the child
        self._happened: list[str] = []  # events of the hook that holds the lock
        self._retired: list[tuple[int, Freed]] = []
        self._retired_bytes = 0  # of them that nothing else names
        self._too_much_retired = RETIRED_BYTES
        self._held_room: set[tuple[int, int]] = set()  # for tables that are about to be taken
        self._reap_lock = allocate_lock()
        self._first_write_lock = allocate_lock()
        self._first_write_done = False
        self._decoded: dict[tuple[int, int, int], bytes] = {}
        self._decoded_bytes = 0
        self._decoding: set[tuple[int, int, int]] = set()
        self._decoded_changed = Condition()

    # ------------------------------------------------------------------ hooks of the driver

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        """The longest uniform run from `offset`, at most `length`, inside of one child.

        Called without the metadata lock; may load tables. `length` may be cut short at any
        boundary that is convenient. With `write`, `writable` must be right.
        """
        raise UnsupportedError(f"{self.driver} does not map")

    def allocate(self, offset: int, length: int) -> Allocation:
        """Find room for [offset, offset + length), whole fill units, perhaps past the end.

        Under the metadata lock: may raise TableMiss (through `Table.get`) and NeedGrowth
        before it changes anything. May give a prefix, or more around it in the same cluster
        (a compressed cluster must be replaced whole); all of it will be filled and published.
        """
        raise UnsupportedError(f"{self.driver} images cannot be written")

    def has_block(self, offset: int) -> bool:
        """Whether a write at `offset` finds host space, so that only its validity changes.

        For formats whose `fill_size` is below `cluster_size`. Without the metadata lock; may
        load tables. A hint: a block may be gone when `allocate` is called.
        """
        return False

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """Make [start, stop), whole fill units of the allocation, valid. Cannot fail."""
        raise UnsupportedError(f"{self.driver} images cannot be written")

    def abandon(self, allocation: Allocation) -> None:
        """Give back room that was not published."""

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """Make whole fill units from `offset` read as zero, as the backing file, or as anything.

        Args:
            offset, length: whole units, but for the node's end.
            to: TO_ZERO, TO_BACKING or TO_ANY.
            keep: keep the space, where the format can.

        Returns:
            How many bytes from `offset` are done (0: cannot; bytes are written instead), and
            what lost its name.
        """
        return 0, ()

    def release(self, freed: Freed) -> None:
        """Make freed space available again."""

    def decode(self, unit: Unit, encoded: memoryview, out: memoryview) -> None:
        """Fill `out`, `unit.length` bytes, from `encoded`. Thread-safe, no I/O."""
        raise UnsupportedError(f"{self.driver} has no encoded units")

    def allocate_encoded(self, offset: int, length: int, host_length: int) -> Allocation:
        """Room for a payload of `host_length` bytes; byte-granular. As `allocate`."""
        raise UnsupportedError(f"{self.driver} stores nothing compressed")

    def transform(self, offset: int, host_offset: int, view: memoryview, encrypt: bool) -> None:
        """Encrypt or decrypt `view` in place, if `has_transform`."""

    def first_write(self) -> None:
        """Write durably what must precede the first changed byte."""

    def finish(self) -> None:
        """Write what marks a clean end; the tables were flushed."""

    # -------------------------------------------------------------- calls under the metadata lock

    def _locked(self, hook: Callable[[], T]) -> tuple[T, list[Slice]]:
        """Call a hook under the metadata lock until it has all it needs.

        Returns its result and the slices it got, pinned.
        """
        cache = self.cache
        pinned: list[Slice] = []
        journal = cache.journal if cache is not None else None
        if cache is not None and journal is not None and cache.dirty_bytes * 2 > journal.capacity:
            self._flush_tables()  # no hook changes more than half of what one commit takes
        try:
            while True:
                try:
                    with self.metadata_lock:
                        self._happened = []
                        result = (hook(), []) if cache is None else cache.pinning(hook)
                        happened = self._happened
                    if happened:
                        self._tell_all(happened)
                    return result
                except TableMiss as miss:
                    for key in miss.keys:
                        pinned.append(miss.table.cache.load(miss.table, key, pin=True))
                except NeedWork as need:
                    need.work()
        finally:
            self._unpin(pinned)

    def happens(self, *events: str) -> None:
        """Note what a hook does, for a fault-injecting node below. Under the metadata lock.

        It is told once the lock is left, since a breakpoint makes the request wait there: before
        the request goes on, and thus before it writes anything.
        """
        if self.children["file"].node.event_hook is not None:
            self._happened += events

    def _tell_all(self, events: list[str]) -> None:
        for event in events:
            self.children["file"].event(event)

    def under_lock(self, hook: Callable[[], T]) -> T:
        """Call a hook as `_locked` does; no slice stays pinned."""
        result, pinned = self._locked(hook)
        self._unpin(pinned)
        return result

    def need_room(self, child: Child, *spans: tuple[int, int]) -> None:
        """Have room for tables that will be written later: by then the disk may be full.

        Under the metadata lock, before anything is changed: may raise NeedWork.

        Args:
            child: where they are going to be.
            spans: (offset, length) in it.

        Raises:
            NoSpaceError: the disk is full now; raised by the work.
        """
        if self._held_room.issuperset(spans):
            self._held_room.difference_update(spans)
            return
        raise NeedWork(lambda: self._hold_room(child, spans))

    def _hold_room(self, child: Child, spans: tuple[tuple[int, int], ...]) -> None:
        for offset, length in spans:
            child.node.reserve_space(offset, length)
        with self.metadata_lock:
            if len(self._held_room) > MAX_HELD_ROOM:
                self._held_room.clear()  # of hooks that took another place in the end
            self._held_room.update(spans)

    def _unpin(self, slices: list[Slice]) -> None:
        if slices:
            with self.metadata_lock:
                for found in slices:
                    found.pins -= 1

    def _allocate(self, offset: int, length: int) -> Allocation:
        if len(self._retired) >= RETIRED_BATCH:
            self.reap()
        if self._retired_bytes >= self._too_much_retired:
            self._take_back()
        return self._pinned(lambda: self.allocate(offset, length))

    def _take_back(self) -> None:
        """Write the tables, and have again what waited for that alone."""
        self._flush_tables()
        self.reap()
        # What somebody inside the gate may still use does not make every write flush.
        self._too_much_retired = self._retired_bytes + RETIRED_BYTES

    def _have_back(self) -> bool:
        """Whether freed space, which waited for the tables on disk, could be had again."""
        before = self._retired_bytes
        if before:
            self._take_back()
        return self._retired_bytes < before

    def _pinned(self, hook: Callable[[], Allocation]) -> Allocation:
        allocation, pinned = self._locked(hook)
        allocation.pinned = pinned
        return allocation

    def _abandon(self, allocation: Allocation) -> None:
        with self.metadata_lock:
            self.abandon(allocation)
            for found in allocation.pinned:
                found.pins -= 1

    def _give_up(self, allocation: Allocation, error: BaseException | None) -> None:
        """Abandon room that could not be filled.

        A file system that is full gets back what was filled of it: the tables of what was
        written before must still find room, else the node breaks and their space is lost.
        """
        if isinstance(error, NoSpaceError):
            for place in allocation.places:
                try:
                    if place.fresh:  # nobody but this request knows of it
                        place.child.discard(place.host_offset, place.length)
                except (DiskwrightError, OSError):
                    pass  # the first error is the one to tell
        self._abandon(allocation)

    def _publish(self, allocation: Allocation, start: int, stop: int) -> None:
        for place in allocation.places:
            place.child.event("cluster_link")
        try:
            for _ in range(MAX_PUBLISHES):
                if self._published(allocation, start, stop):
                    return
                self._flush_tables()
            raise IOFailure(f"The journal of {self.describe()} is always full")
        except BaseException:
            self._abandon(allocation)
            raise

    def _published(self, allocation: Allocation, start: int, stop: int) -> bool:
        """Publish, unless the journal must be emptied first."""
        with self.metadata_lock:
            if self._overfills_journal(allocation):
                return False
            freed = self.publish(allocation, start, stop)
            for found in allocation.pinned:
                found.pins -= 1
            self.retire(freed)
        return True

    def _overfills_journal(self, allocation: Allocation) -> bool:
        """Whether what a publish changes would not fit into one commit with what is dirty."""
        cache = self.cache
        if cache is None or cache.journal is None or not cache.dirty_bytes:
            return False
        coming = sum(found.table.slice_bytes for found in allocation.pinned if not found.is_dirty)
        return cache.dirty_bytes + coming > cache.journal.capacity

    def retire(self, freed: Sequence[Freed]) -> None:
        """Remember freed space until nobody can be using it. Under the metadata lock."""
        if freed:
            epoch = self.graph.next_epoch()
            for space in freed:
                if space.slice is not None:
                    space.generation = space.slice.generation
                self._retired.append((epoch, space))
                self._retired_bytes += space.length if space.sole else 0

    @property
    def writes_begun(self) -> bool:
        """Whether `first_write` has been run, and no clean end since."""
        return self._first_write_done

    @property
    def retired_pieces(self) -> int:
        """How much freed space waits, in pieces: a bound for what frees a lot at once."""
        return len(self._retired)

    def reap(self) -> None:
        """Release what nobody uses any more and the disk does not name any more."""
        if not self._retired:
            return
        with self._reap_lock:
            oldest = self.graph.oldest()
            with self.metadata_lock:
                ready: list[tuple[int, Freed]] = []
                waiting: list[tuple[int, Freed]] = []
                for entry in self._retired:
                    space = entry[1]
                    durable = space.slice is None or space.slice.on_disk(space.generation)
                    (ready if entry[0] < oldest and durable else waiting).append(entry)
                self._retired = waiting
                left = sum(space.length for _, space in waiting if space.sole)
                self._retired_bytes = left
                self._too_much_retired = min(self._too_much_retired, left + RETIRED_BYTES)
            for _, space in ready:
                self._drop_decoded(space)
                if space.sole and self.pass_discard:
                    space.child.discard(space.host_offset, space.length)
                # mypy infers no types of a lambda's defaults
                self.under_lock(lambda space=space: self.release(space))  # type: ignore[misc]

    # ------------------------------------------------------------------------- rest and end

    def before_write(self) -> None:
        """Run `first_write` once, and let nobody pass before it ended."""
        if self._first_write_done:
            return
        with self._first_write_lock:
            if not self._first_write_done:
                self.first_write()
                self._first_write_done = True
                self._arm_writes()

    def _reopened(self) -> None:
        """The next write is a first one again: a clean end was written, or never a beginning."""
        self._first_write_done = False

    def _may_write_around(self) -> bool:
        return self._first_write_done and not self.has_transform

    def _flush(self) -> None:
        self.tell("flush_to_os")
        self._flush_tables()
        self.tell("flush_to_disk")
        try:
            for child in self.children.values():
                if child.name != "backing" and not child.node.read_only:
                    child.flush()
        except DiskwrightError as error:
            self.break_off(f"a flush failed ({error})")
            raise
        self.reap()

    @property
    def has_unflushed(self) -> bool:
        """As of every node; and tables, and freed space."""
        dirty = self.cache is not None and bool(self.cache.dirty_slices)
        return dirty or bool(self._retired) or super().has_unflushed

    def _flush_tables(self) -> None:
        if self.cache is not None:
            self.cache.flush()

    def _attach_lent(self) -> None:
        if self.cache is not None:
            self.cache.on_failure = self._metadata_failed
        super()._attach_lent()

    def _metadata_failed(self, error: BaseException) -> None:
        self.break_off(f"metadata could not be written ({error})")

    def _after_fork(self) -> None:
        super()._after_fork()
        self.metadata_lock.reset()
        self._decoding.clear()
        self._decoded_changed = Condition()
        if self.cache is not None:
            self.cache.after_fork()

    def settle(self) -> None:
        """Flush until nothing is dirty or retired; under exclusive."""
        if self.read_only or self.broken is not None:
            return
        for _ in range(8):
            if not self.has_unflushed:
                return
            self.flush_inside()
            if not self._retired:
                if self.cache is not None and self.cache.dirty_slices:
                    self.cache.flush_all()
                return
        raise IOFailure(f"{self.describe()} does not come to rest", node=self.node_name)

    def _finish(self) -> None:
        self.settle()
        if self._first_write_done:
            self.finish()
            self._first_write_done = False  # what is written after a clean end begins anew
            self._arm_writes()

    def _drop_decoded(self, freed: Freed) -> None:
        """Forget what was decoded out of space that is about to be reused."""
        first, stop = freed.host_offset, freed.host_offset + freed.length
        with self._decoded_changed:
            for key in list(self._decoded):
                if key[0] == id(freed.child) and key[1] < stop and key[1] + key[2] > first:
                    self._decoded_bytes -= len(self._decoded.pop(key))

    def forget_decoded(self) -> None:
        """Drop all decoded units; the image was changed under exclusive."""
        with self._decoded_changed:
            self._decoded.clear()
            self._decoded_bytes = 0
