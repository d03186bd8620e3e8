"""The cache of an image's tables, and the order in which they reach the disk.

A *slice* is the piece of a table that is loaded and written as one; its key is its offset in
the child. A slice is clean (as on disk), dirty (changed since a flush copied it) or gone.

Invariants (tests/unit/test_table_cache.py, tests/crash):

1. A slice's items change only under the metadata lock, and then `dirty()` is called.
2. A flush copies all dirty slices in one step under that lock, then writes without it: data
   and rank 0 share the first barrier, then rank by rank with a barrier between. So what names
   something is never on disk before what it names.
3. Items of a slice that was evicted never change: who still reads it sees an older state,
   whose host space retirement keeps.
4. Eviction takes clean, unpinned slices only, under the metadata lock, so no hook that runs
   under it loses what it got.
5. `get` under the metadata lock never does I/O: what is missing raises TableMiss, the engine
   loads it without the lock and calls the hook again.
6. With a journal, all slices of one copy go into one commit.
7. After a write failed nothing is clean that was not before: the node is broken.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock
from array import array
from time import monotonic

from diskwright.block.inflight import Condition, Joined
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeVar

    from diskwright.block.child import Child
    from diskwright.block.inflight import OwnedLock

    T = TypeVar("T")


def _ignore(error: BaseException) -> None:
    return


class TableMiss(Exception):
    """Slices are needed that are not in memory; only ever seen by the engine."""

    def __init__(self, table: Table, *keys: int) -> None:
        super().__init__(f"{table.name} slice at {keys[0]}")
        self.table = table
        self.keys = keys


class Slice:
    """A piece of a table. `items` are in native byte order."""

    __slots__ = ("_promised", "_written", "generation", "items", "key", "pins", "table", "used")

    def __init__(self, table: Table, key: int, items: array[int]) -> None:
        self.table = table
        self.key = key
        self.items = items
        self.generation = 0  # how often it was changed
        self._written = 0  # the generation that is on disk
        self._promised: tuple[int, array[int]] | None = None  # a state to write
        self.pins = 0
        self.used = True

    def dirty(self) -> None:
        """Say that the items were changed; under the metadata lock."""
        if self.generation == self._written:
            cache = self.table.cache
            cache.dirty_bytes += self.table.slice_bytes
            cache.dirty_slices[id(self)] = self
        self.generation += 1

    def promise(self) -> None:
        """Have the next flush write the items as they are now, also where that is deferred."""
        if self.is_dirty and self.table.deferred:
            self._promised = (self.generation, self.items[:])

    def to_write(self, everything: bool) -> tuple[int, array[int]] | None:
        """(generation, items) that a flush has to write; None: nothing of it."""
        if everything or not self.table.deferred:
            return self.generation, self.items[:]
        return self._promised

    @property
    def waits(self) -> bool:
        """Whether a flush has something of it to write."""
        return self.is_dirty and (not self.table.deferred or self._promised is not None)

    @property
    def is_dirty(self) -> bool:
        """Whether the disk has something older."""
        return self.generation != self._written

    def on_disk(self, generation: int) -> bool:
        """Whether the state of `generation`, or a later one, is durable."""
        return self._written >= generation

    def _became_durable(self, generation: int) -> None:
        if generation <= self._written:
            return
        self._written = generation
        if self._promised is not None and self._promised[0] <= generation:
            self._promised = None
        if self.generation == generation:
            cache = self.table.cache
            if cache.dirty_slices.pop(id(self), None) is not None:
                cache.dirty_bytes -= self.table.slice_bytes


class Journal(Record):
    """How a journaled format makes several writes one.

    Attributes:
        capacity: bytes of slices that one commit can take.
        commit: called with [(host offset, bytes)], returns when they are durable as a whole.
    """

    __slots__ = ("capacity", "commit")

    def __init__(
        self, capacity: int, commit: Callable[[Sequence[tuple[int, bytes]]], None]
    ) -> None:
        self.capacity = capacity
        self.commit = commit


class Table:
    """One kind of table of an image; made by `TableCache.table`."""

    __slots__ = (
        "_swap",
        "cache",
        "child",
        "copies",
        "deferred",
        "event",
        "name",
        "rank",
        "slice_bytes",
        "slices",
        "typecode",
        "write_event",
    )

    def __init__(self, cache: TableCache, name: str, typecode: str, byteorder: str) -> None:
        self.cache = cache
        self.child = cache.child
        self.name = name
        self.typecode = typecode
        self.slices: dict[int, Slice] = {}
        self.slice_bytes = 0
        self.rank = 0
        self.copies: tuple[int, ...] = ()
        self.deferred = False  # written when evicted, promised, or by `flush_all` only
        self.event = ""
        self.write_event = ""
        self._swap = byteorder != sys.byteorder and array(typecode).itemsize > 1

    def peek(self, key: int) -> array[int] | None:
        """The items of a slice if it is in memory; no I/O, no lock."""
        found = self.slices.get(key)
        if found is None:
            return None
        found.used = True
        return found.items

    def get(self, key: int) -> Slice:
        """The slice at host offset `key`, loaded if need be.

        Under the metadata lock it raises TableMiss instead of loading; see the contract there.
        """
        found = self.slices.get(key)
        cache = self.cache
        if cache.lock.held():
            if found is None:
                raise TableMiss(self, key)
            cache.touched.append(found)
        elif found is None:
            return cache.load(self, key)
        found.used = True
        return found

    def create(self, key: int, fill: int = 0) -> Slice:
        """A slice for fresh space: nothing is read, and it is dirty. Under the metadata lock."""
        count = self.slice_bytes // array(self.typecode).itemsize
        made = Slice(self, key, array(self.typecode, [fill]) * count)
        self.forget(key)
        self.slices[key] = made
        self.cache.bytes += self.slice_bytes
        if self.cache.lock.held():
            self.cache.touched.append(made)
        made.dirty()
        return made

    def forget(self, key: int) -> None:
        """Drop a slice whose space was freed, without writing it. Under the metadata lock."""
        found = self.slices.pop(key, None)
        if found is not None:
            self.cache.bytes -= self.slice_bytes
            if self.cache.dirty_slices.pop(id(found), None) is not None:
                self.cache.dirty_bytes -= self.slice_bytes

    def promise(self) -> None:
        """Have the next flush write what is dirty now, also where that is deferred."""
        if self.deferred:
            for found in self.cache.dirty_slices.values():
                if found.table is self:
                    found.promise()

    def decode(self, data: bytes) -> array[int]:
        """Table bytes as on disk -> items in native order."""
        items = array(self.typecode)
        items.frombytes(data)
        if self._swap:
            items.byteswap()
        return items

    def encode(self, items: array[int]) -> bytes:
        """Items -> bytes as on disk."""
        if self._swap:
            items = items[:]
            items.byteswap()
        return items.tobytes()


class TableCache:
    """All cached tables of one child of one mapped node.

    Args:
        child: where the tables lie.
        lock: the node's metadata lock.
        capacity_bytes: memory for slices; dirty and pinned ones may exceed it for a while.
        journal: for formats that have one, instead of ranks.
        data: the other children whose writes must be durable before any table.
        clean_seconds: slices that nobody used for so long go when others are loaded; 0: stay.
    """

    def __init__(
        self,
        child: Child,
        lock: OwnedLock,
        *,
        capacity_bytes: int = 32 << 20,
        journal: Journal | None = None,
        data: Iterable[Child] = (),
        clean_seconds: int = 0,
    ) -> None:
        self._clean_seconds = clean_seconds
        self._cleaned = monotonic() if clean_seconds else 0.0
        self.child = child
        self.lock = lock
        self.capacity_bytes = capacity_bytes
        self.journal = journal
        self.data_children = list(data)
        self.tables: list[Table] = []
        self.bytes = 0
        self.dirty_bytes = 0
        self.dirty_slices: dict[int, Slice] = {}
        self.touched: list[Slice] = []  # what the hook that holds the lock got so far
        #: told when tables could not be written; the node is broken then
        self.on_failure: Callable[[BaseException], None] = _ignore
        self._failed = False
        self._all = 0  # callers that want the deferred tables written too
        self._loading: set[tuple[int, int]] = set()
        self._loaded = Condition()
        self._hand_lock = allocate_lock()
        self._flush_joined = Joined(self._write_or_break)

    def table(
        self,
        name: str,
        *,
        typecode: str,
        byteorder: str,
        slice_bytes: int,
        rank: int = 0,
        copies: Iterable[int] = (),
        event: str = "",
        write_event: str = "",
    ) -> Table:
        """Declare a table.

        Args:
            name: for messages.
            typecode: of `array`: B, H, I or Q.
            byteorder: "big" or "little", as on disk.
            slice_bytes: what is loaded and written as one.
            rank: lower ranks are durable before higher ones are written.
            copies: distances in bytes at which every write is repeated.
            event: what a fault-injecting node is told before a load ("l2_load").
            write_event: and before a write ("l2_update").
        """
        made = Table(self, name, typecode, byteorder)
        made.slice_bytes = slice_bytes
        made.rank = rank
        made.copies = tuple(copies)
        made.event = event
        made.write_event = write_event
        self.tables.append(made)
        return made

    # ------------------------------------------------------------------------------ loading

    def load(self, table: Table, key: int, *, pin: bool = False) -> Slice:
        """The slice at `key`, read by one thread while others wait. Without the lock."""
        mark = (id(table), key)
        while True:
            with self._loaded:
                while mark in self._loading:
                    self._loaded.wait()
                found = table.slices.get(key)
                if found is None:
                    self._loading.add(mark)
            if found is None:
                break
            if not pin:
                return found
            with self.lock:
                if table.slices.get(key) is found:
                    found.pins += 1
                    return found
        try:
            self.make_room(table.slice_bytes)
            if table.event:
                self.child.event(table.event)
            items = table.decode(self.child.read(key, table.slice_bytes))
            with self.lock:
                found = table.slices.get(key)
                if found is None:
                    found = table.slices[key] = Slice(table, key, items)
                    self.bytes += table.slice_bytes
                found.pins += pin
        finally:
            with self._loaded:
                self._loading.discard(mark)
                self._loaded.notify_all()
        return found

    def pinning(self, hook: Callable[[], T]) -> tuple[T, list[Slice]]:
        """Call `hook` under the metadata lock; its result and the slices it got, pinned."""
        self.touched = []
        result = hook()
        touched, self.touched = self.touched, []  # what others get later is not the hook's
        for found in touched:
            found.pins += 1
        return result, touched

    def make_room(self, wanted: int) -> None:
        """Evict until `wanted` more bytes fit, flushing if all is dirty. Without the lock."""
        if self._clean_seconds and monotonic() - self._cleaned >= self._clean_seconds:
            self._clean()
        if self.bytes + wanted <= self.capacity_bytes:
            return
        # More than needed, so that not every load has to look at all slices.
        spare = max(wanted, self.capacity_bytes >> 3)
        self._evict(spare)
        if self.bytes + wanted > self.capacity_bytes and self.dirty_slices and not self._failed:
            try:
                self.flush_all()
            except DiskwrightError:
                return  # the node is broken now; who only reads goes on, in more memory
            self._evict(spare)

    def _clean(self) -> None:
        """Drop what was not used since the last time."""
        with self.lock:
            self._cleaned = monotonic()
            for table in self.tables:
                for key, found in list(table.slices.items()):
                    if not (found.used or found.pins or found.is_dirty):
                        del table.slices[key]
                        self.bytes -= table.slice_bytes
                    found.used = False

    def _evict(self, wanted: int) -> None:
        """Second chance: a slice used since the last look stays for this one."""
        with self.lock:
            everything = [found for table in self.tables for found in table.slices.values()]
            for found in everything * 2:
                if self.bytes + wanted <= self.capacity_bytes:
                    return
                if found.pins or found.is_dirty or found.key not in found.table.slices:
                    continue
                if found.used:
                    found.used = False
                    continue
                del found.table.slices[found.key]
                self.bytes -= found.table.slice_bytes

    def drop(self) -> None:
        """Forget everything, dirty or not; the image was changed behind the cache."""
        with self.lock:
            for table in self.tables:
                table.slices.clear()
            self.dirty_slices.clear()
            self.bytes = self.dirty_bytes = 0

    # ------------------------------------------------------------------------------ writing

    def flush(self) -> None:
        """Write what is dirty, in order, and make it durable; joins a flush to come.

        The data that it names are durable before; data that nothing dirty names are not.

        Must not be called under the metadata lock.
        """
        self._flush_joined()

    def flush_all(self) -> None:
        """As `flush`, with the tables whose writing was deferred."""
        with self.lock:
            self._all += 1
        try:
            self._flush_joined()
        finally:
            with self.lock:
                self._all -= 1

    @property
    def clean(self) -> bool:
        """Whether nothing waits to be written, deferred tables apart."""
        return not any(found.waits for found in list(self.dirty_slices.values()))

    def after_fork(self) -> None:
        """Forget the threads that were loading as the process was forked."""
        self._loading.clear()
        self._loaded = Condition()

    def _write_or_break(self) -> None:
        try:
            self._write_out()
        except BaseException as error:
            self._failed = True
            self.on_failure(error)
            raise

    def _write_out(self) -> None:
        with self.lock:
            everything = bool(self._all)
            work = [
                (found.table.rank, found, *state)
                for found in self.dirty_slices.values()
                if (state := found.to_write(everything)) is not None
            ]
        if not work:
            return  # data alone are the node's to flush
        for child in self.data_children:
            child.flush()
        if self.journal is not None:
            self.child.flush()
            assert sum(len(items) * items.itemsize for *_, items in work) <= self.journal.capacity
            self.journal.commit([(s.key, s.table.encode(items)) for _, s, _, items in work])
        else:
            self._write_ranks(work)
        with self.lock:
            for _, found, generation, _ in work:
                found._became_durable(generation)

    def _write_ranks(self, work: list[tuple[int, Slice, int, array[int]]]) -> None:
        work.sort(key=lambda entry: (entry[0], entry[1].key))
        rank = 0
        for entry_rank, found, _, items in work:
            if entry_rank > rank:
                self.child.flush()
                rank = entry_rank
            data = found.table.encode(items)
            if found.table.write_event:
                self.child.event(found.table.write_event)
            self.child.write(found.key, data)
            for distance in found.table.copies:
                self.child.write(found.key + distance, data)
        self.child.flush()
