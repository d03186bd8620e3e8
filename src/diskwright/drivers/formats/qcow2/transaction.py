"""Changes of many tables that become valid by one write of the header's fields.

New tables and refcount blocks are written to clusters that are free before *and* after; then
they are flushed; then the header, less than a sector, names them. A crash at any point leaves
the old state or the new one, whole, without a leak in either. Snapshots, resizing, emptying
and repair use this.

Memory: the refcounts of the image, one array item a cluster that is in a changed block.
"""

from __future__ import annotations

import errno
import os
from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFTABLE_RESERVED,
    ZERO_FLAG,
    add_to_counts,
    number,
    runs,
)
from diskwright.drivers.formats.qcow2.header import MAX_REFTABLE_BYTES
from diskwright.errors import IOFailure, NoSpaceError, UnsupportedError

#: What a file system gives space in, mostly.
_PAGE = 4096

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.extensions import Extensions

#: Host offsets are below this.
_END = 1 << 56


class Transaction:
    """One such change; the caller has the graph to itself and the node is at rest.

    Args:
        node: the image.
        rebuild: refcount blocks and their table are written anew, whatever is there; what
            they occupied is not counted any more.
        avoid: clusters that are not to be used, because a damaged entry may name them.
        discard: what is freed is given back to the file system.
    """

    def __init__(
        self,
        node: Qcow2,
        *,
        rebuild: bool = False,
        avoid: frozenset[int] | set[int] = frozenset(),
        discard: bool | None = None,
    ) -> None:
        self.node = node
        self._discards = node.settings.discards_other if discard is None else discard
        self.size = node.cluster_size
        self.bits = node.header.cluster_bits
        self.table = node.refcounts.table
        self.width = node.refcounts.width
        self.entries = node.refcounts.block_entries
        self.maximum = node.refcounts.maximum
        self.fields: dict[str, int] = {}  # of the header, as they will be
        self.extensions: Extensions | None = None  # of the header, if others than now
        self.header_event = ""  # what a fault-injecting node hears before the header is written
        self.rebuilds = rebuild
        self._avoid = avoid
        self._end = max(node.file.size, self.size)
        self._old: dict[int, array[int]] = {}
        self._new: dict[int, array[int]] = {}
        self._hint = 0  # no cluster below is free in both states
        self._others: set[int] | None = None

    # -------------------------------------------------------------------------------- refcounts

    def block_offset(self, block: int) -> int:
        """Where a refcount block is on disk; 0 where there is none that could be."""
        entry = self.table[block] & ~REFTABLE_RESERVED if block < len(self.table) else 0
        return 0 if entry & (self.size - 1) or entry >= self._end else entry

    def before(self, block: int) -> array[int]:
        """The refcounts of a block as they are on disk."""
        found = self._old.get(block)
        if found is None:
            check_cancelled()
            host = self.block_offset(block)
            if host:
                raw = self.node.refcounts.blocks.decode(self.node.file.read(host, self.size))
                found = self.width.unpack(raw)
            else:
                found = array(self.width.typecode, bytes(array(self.width.typecode).itemsize))
                found *= self.entries
            self._old[block] = found
        return found

    def after(self, block: int) -> array[int]:
        """The refcounts of a block as they will be; to be looked at only."""
        counts = self._new.get(block)
        return self.before(block) if counts is None else counts

    def changed(self, block: int) -> array[int]:
        """The refcounts of a block as they will be; to be changed."""
        counts = self._new.get(block)
        if counts is None:
            counts = self._new[block] = self.before(block)[:]
        return counts

    def replace(self, block: int, have: array[int], made: array[int]) -> None:
        """Decide all refcounts of a block; in a rebuild also where nothing changes."""
        if made.tobytes() != have.tobytes() or (self.rebuilds and any(made)):
            self._new[block] = made

    def move_blocks(self, limit: int) -> None:
        """Write the refcount blocks at host offsets from `limit` on anew."""
        for block in range(len(self.table)):
            if self.block_offset(block) >= limit:
                self.changed(block)

    def count(self, cluster: int) -> int:
        """The refcount as it will be."""
        return self.after(cluster // self.entries)[cluster % self.entries]

    def change(self, host_offset: int, length: int, step: int) -> None:
        """Add `step`, 1 or -1, to the refcounts of a host range; one that is 0 stays there.

        Raises:
            UnsupportedError: a refcount would not fit into its bits.
        """
        if length <= 0:
            return
        cluster, stop = host_offset >> self.bits, ((host_offset + length - 1) >> self.bits) + 1
        while cluster < stop:
            block, first = divmod(cluster, self.entries)
            last = min(first + stop - cluster, self.entries)
            counts = self.changed(block)
            part = counts[first:last]
            if step > 0 and max(part) >= self.maximum:
                raise self._too_many()
            if step < 0 and 0 in part:
                for at in range(first, last):
                    counts[at] -= counts[at] > 0
            else:
                add_to_counts(counts, first, last, step)
            cluster += last - first

    def _too_many(self) -> UnsupportedError:
        return UnsupportedError(
            f"A refcount of {self.node.describe()} would exceed {self.maximum}",
            hint="an image with a larger refcount_bits can hold more snapshots",
            qemu="Invalid argument",
        )

    def take(self, clusters: int) -> int:
        """The host offset of contiguous clusters that are free in both states.

        Raises:
            NoSpaceError: a file cannot be that long.
        """
        self.node.file.event("cluster_alloc")
        self.node.file.event("refblock_alloc")
        start, length, cluster = self._hint, 0, self._hint
        while length < clusters:
            block, inside = divmod(cluster, self.entries)
            before, after = self.before(block), self.after(block)
            while length < clusters and inside < self.entries:
                if before[inside] or after[inside] or self._is_avoided(block, inside):
                    length = 0
                    inside = self._next_free(before, inside + 1)
                    start = block * self.entries + inside
                else:
                    length += 1
                    inside += 1
            cluster = block * self.entries + inside
            if cluster << self.bits > _END:
                raise NoSpaceError("A qcow2 file cannot be longer than 2^56 bytes", errno=27)
        if clusters == 1:
            self._hint = start + 1
        if not self.rebuilds:  # a rebuild is done because the refcounts are wrong
            self.node.guard(start << self.bits, clusters << self.bits)
        self.change(start << self.bits, clusters << self.bits, 1)
        # What is written there stays if the rest of the change fails.
        self.node.note_used((start + clusters) << self.bits)
        return start << self.bits

    def _is_avoided(self, block: int, inside: int) -> bool:
        return bool(self._avoid) and block * self.entries + inside in self._avoid

    def _next_free(self, counts: array[int], inside: int) -> int:
        try:
            return counts.index(0, inside)
        except ValueError:
            return self.entries

    # ------------------------------------------------------------------------------------ tables

    def write(self, data: bytes, *, event: str = "") -> int:
        """Put a table into free clusters, which a fault-injecting node hears; its host offset."""
        host = self.take(max(-(-len(data) // self.size), 1))
        padded = data + bytes(-len(data) % min(self.size, _PAGE))
        if event:
            self.node.file.event(event)
        self.node.file.write(host, padded)
        rest = -len(padded) % self.size
        if rest:  # a hole, where the file may have one
            self.node.file.write_zeroes(host + len(padded), rest, unmap=True)
        return host

    def l2(self, index: int, entry: int) -> array[int]:
        """The L2 table that an L1 entry names."""
        host = entry & OFFSET_MASK
        if host & (self.size - 1):
            self.node.corrupt(
                f"L2 table offset {number(host)} unaligned (L1 index: {number(index)})"
            )
        if host in self._fixed() and (name := self.node.other_metadata(host, self.size)):
            self.node.corrupt(f"L2 table offset {number(host)} overlaps with {name}")
        self._refuse_outside(host, self.size)
        return self.node.l2_table.decode(self.node.file.read(host, self.size))

    def _fixed(self) -> set[int]:
        """The clusters that hold other metadata than L2 tables."""
        if self._others is None:
            self._others = self.node.fixed_metadata()
        return self._others

    def each_l2(self, l1: array[int], visit: Callable[[int, int, array[int]], None]) -> None:
        """Call `visit(index, entry, L2 items)` for every L2 table of an L1 table."""
        for index, entry in enumerate(l1):
            if entry & OFFSET_MASK:
                check_cancelled()
                visit(index, entry, self.l2(index, entry))

    def change_named(self, items: array[int], step: int) -> None:
        """Add `step` for all that the entries of an L2 table name."""
        if self.node.external:
            return  # no refcount speaks of the data
        items = self.node.entries.descriptors(items)
        for index, count in runs(items, self.size):
            entry = items[index]
            if entry & COMPRESSED:
                host, length = self.node.payload_of(entry)
                self._refuse_outside(host, length)
                self.change(host, length, step)
            elif entry & OFFSET_MASK:
                host = entry & OFFSET_MASK
                if host & (self.size - 1):
                    kind = "Preallocated zero cluster" if entry & ZERO_FLAG else "Data cluster"
                    self.node.corrupt(
                        f"{kind} offset {number(host)} unaligned (L2 index: {number(index)})"
                    )
                self.node.guard(host, count << self.bits)
                self._refuse_outside(host, count << self.bits)
                self.change(host, count << self.bits, step)

    def _refuse_outside(self, host: int, length: int) -> None:
        """Refuse what lies far behind the file's end, where no refcount block speaks of it.

        Raises:
            IOFailure: it does; there may be no room in the table for so many blocks.
        """
        block = (host + length - 1) >> self.bits
        if host + length > self._end + self.size and not self.block_offset(block // self.entries):
            # QEMU makes the block, and has whoever wants to allocate look anew.
            fits = (block // self.entries + 1) * 8 <= MAX_REFTABLE_BYTES
            code = errno.EAGAIN if fits else errno.EFBIG
            raise IOFailure(
                f"{self.node.describe()} names a cluster at {host:#x}, beyond its file's end",
                errno=code,
                path=self.node.filename,
                qemu=os.strerror(code),
                hint="check the image: diskwright-img check",
            )

    def drop_l1(self, l1: array[int], offset: int) -> None:
        """Forget an L1 table at `offset`, its L2 tables, and what they name."""
        self.drop_l2(l1)
        self.change(offset, len(l1) * 8, -1)

    def drop_l2(self, l1: array[int]) -> None:
        """Forget the L2 tables that entries of an L1 table name, and what they name."""

        def visit(index: int, entry: int, items: array[int]) -> None:
            self.change(entry & OFFSET_MASK, self.size, -1)
            self.change_named(items, -1)

        self.each_l2(l1, visit)

    def keep_l1(self, l1: array[int]) -> None:
        """One reference more to all that the L2 tables of an L1 table name."""
        self.each_l2(l1, lambda index, entry, items: self.change_named(items, 1))

    def flagged(self, items: array[int]) -> array[int]:
        """The entries with the flag COPIED as the new refcounts have it."""
        named = self.node.entries.descriptors(items)
        made = named[:]
        for index, length in runs(named, self.size):
            entry = named[index]
            if entry & COMPRESSED or not entry & OFFSET_MASK:
                continue
            cluster = (entry & OFFSET_MASK) >> self.bits
            for at in range(length):
                sole = self.count(cluster + at) == 1
                if sole != (entry >= COPIED):
                    made[index + at] ^= COPIED
        return self.node.entries.with_descriptors(items, made)

    def copy_l1(self, l1: array[int]) -> array[int]:
        """A new L1 table for the active state. What the old one names stays in use.

        Where no flag has to change, the L2 table is shared, else copied.
        """
        made = array("Q", bytes(8 * len(l1)))

        def visit(index: int, entry: int, items: array[int]) -> None:
            wanted = self.flagged(items)
            host = entry & OFFSET_MASK
            if wanted == items and self.count(host >> self.bits) < self.maximum:
                self.change(host, self.size, 1)
                made[index] = host
            else:
                made[index] = self.write(self.node.l2_table.encode(wanted)) | COPIED

        self.each_l2(l1, visit)
        return made

    def refresh_l1(self, l1: array[int]) -> array[int]:
        """The active L1 table with new L2 tables where a flag changed; frees the old ones."""
        made = l1[:]

        def visit(index: int, entry: int, items: array[int]) -> None:
            wanted = self.flagged(items)
            sole = self.count((entry & OFFSET_MASK) >> self.bits) == 1
            if wanted != items:
                self.change(entry & OFFSET_MASK, self.size, -1)
                made[index] = self.write(self.node.l2_table.encode(wanted)) | COPIED
            elif sole != (entry >= COPIED):
                made[index] = (entry & OFFSET_MASK) | (COPIED if sole else 0)

        self.each_l2(l1, visit)
        return made

    def activate(self, l1: array[int], old_offset: int = 0, old_entries: int = 0) -> None:
        """Write an L1 table and let the header name it; the old one is freed, if given."""
        if old_entries:
            self.change(old_offset, old_entries * 8, -1)
            self.node.file.event("cluster_free")
        grows = len(l1) > self.node.header.l1_size
        if grows:
            self.node.file.event("l1_grow_alloc_table")
            self.header_event = "l1_grow_activate_table"
        self.fields["l1_size"] = len(l1)
        event = "l1_grow_write_table" if grows else "l1_update"
        data = self.node.l1_slices.encode(l1)
        self.fields["l1_table_offset"] = self.write(data, event=event) if l1 else 0

    # ------------------------------------------------------------------------------------ commit

    def commit(self) -> None:
        """Write the refcounts, flush, write the header, flush, and read all anew."""
        node = self.node
        if self._new or self.rebuilds:
            self._write_refcounts()
        node.file.flush()
        for name, value in self.fields.items():
            setattr(node.header, name, value)
        try:
            if self.header_event:
                node.file.event(self.header_event)
            if self.extensions is None:
                node.write_header()
            else:
                node.extensions = self.extensions
                node.write_extensions()
        except BaseException as error:
            node.broken = f"the header could not be written ({error})"
            raise
        self._take_over()
        if self._discards:
            self._discard_freed()

    def encode_block(self, counts: array[int]) -> bytes:
        """A refcount block as it is stored."""
        return self.node.refcounts.blocks.encode(self.width.pack(counts))

    def _take_over(self) -> None:
        """Let the node read everything anew: the header names other tables now."""
        self.node.reload()

    def _discard_freed(self) -> None:
        """Give the file system back what nothing names any more."""
        for block, after in self._new.items():
            before = self.before(block)
            # Most of a block may be empty, and what is so to the end has not been freed.
            before = before[: len(before.tobytes().rstrip(b"\0")) // before.itemsize + 1]
            base = block * self.entries
            start = stop = -1
            for at in [at for at, value in enumerate(before) if value and not after[at]]:
                if at != stop:
                    self._discard(base + start, stop - start)
                    start = at
                stop = at + 1
            self._discard(base + start, stop - start)

    def _discard(self, cluster: int, count: int) -> None:
        if count > 0:
            self.node.file.discard(cluster << self.bits, count << self.bits)

    def _write_refcounts(self) -> None:
        """Changed refcount blocks and the table go to new places, which changes them again."""
        header = self.node.header
        old = header.refcount_table_clusters * self.size
        if not self.rebuilds:
            self.change(header.refcount_table_offset, old, -1)
        places: dict[int, int] = {}
        clusters, offset = 0, 0
        while True:
            waiting = [block for block in self._new if block not in places]
            needed = max(-(-(self._last_block() + 1) * 8 // self.size), 1)
            if needed > clusters:
                if clusters:
                    self.change(offset, clusters * self.size, -1)
                clusters = needed
                offset = self.take(clusters)
            elif not waiting:
                break
            for block in waiting:
                old_place = self.block_offset(block)
                if old_place and not self.rebuilds:
                    self.change(old_place, self.size, -1)
                places[block] = self.take(1)
        if clusters * self.size > MAX_REFTABLE_BYTES:
            raise NoSpaceError("The refcount table would be longer than 8 MiB", errno=27)
        self._write_blocks(places, offset, clusters)

    def _last_block(self) -> int:
        if self.rebuilds:
            return max(self._new, default=0)
        return max(max(self._new, default=0), len(self.table) - 1)

    def _write_blocks(self, places: dict[int, int], offset: int, clusters: int) -> None:
        node = self.node
        table = array("Q", bytes(clusters * self.size))
        if not self.rebuilds:
            table[: len(self.table)] = self.table
        for block, host in places.items():
            table[block] = host
            node.file.event("refblock_update_part")
            node.file.write(host, self.encode_block(self._new[block]))
        node.file.event("reftable_update")
        node.file.write(offset, node.l1_slices.encode(table))
        self.fields["refcount_table_offset"] = offset
        self.fields["refcount_table_clusters"] = clusters
