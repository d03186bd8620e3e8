"""Changes of many tables that become valid by one write of the header's first sector.

New tables and refcount blocks are written to clusters that are free before *and* after; then
they are flushed; then the header names them. A crash at any point leaves the old state or the
new one, whole, without a leak in either. Snapshots, resizing, emptying and repair use this.

Memory: the refcounts of the image, eight bytes a cluster that is touched.
"""

from __future__ import annotations

from array import array

from diskwright.drivers.formats.qcow2.refcounts import OFFSET_MASK
from diskwright.drivers.formats.qcow2.tables import COMPRESSED, COPIED
from diskwright.errors import NoSpaceError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.qcow2.driver import Qcow2


class Transaction:
    """One such change; the caller has the graph to itself and the node is at rest."""

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self.size = node.cluster_size
        self.bits = node.header.cluster_bits
        self.table = node.refcounts.table
        self.entries = node.refcounts.block_entries
        self.maximum = node.refcounts.maximum
        self._old: dict[int, array[int]] = {}
        self._new: dict[int, array[int]] = {}
        self._hint = 0

    # -------------------------------------------------------------------------------- refcounts

    def _before(self, block: int) -> array[int]:
        """The refcounts of a block as they are on disk."""
        found = self._old.get(block)
        if found is None:
            found = self._old[block] = self._load(block)
        return found

    def _load(self, block: int) -> array[int]:
        host = self.table[block] & OFFSET_MASK if block < len(self.table) else 0
        if not host:
            return array("Q", bytes(8 * self.entries))
        refcounts = self.node.refcounts
        raw = refcounts.blocks.decode(self.node.file.read(host, self.size))
        if refcounts.bits >= 8:
            return array("Q", raw)
        return array("Q", (refcounts._value(raw, at) for at in range(self.entries)))

    def count(self, cluster: int) -> int:
        """The refcount as it will be."""
        block, inside = divmod(cluster, self.entries)
        counts = self._new.get(block)
        return (self._before(block) if counts is None else counts)[inside]

    def set_count(self, cluster: int, value: int) -> None:
        """Decide a refcount."""
        block, inside = divmod(cluster, self.entries)
        counts = self._new.get(block)
        if counts is None:
            if self._before(block)[inside] == value:
                return
            counts = self._new[block] = self._before(block)[:]
        counts[inside] = value

    def change(self, host_offset: int, length: int, step: int) -> None:
        """Add `step` to the refcounts of a host range."""
        if length <= 0:
            return
        for cluster in range(
            host_offset >> self.bits, ((host_offset + length - 1) >> self.bits) + 1
        ):
            value = self.count(cluster) + step
            if value > self.maximum:
                raise UnsupportedError(
                    f"A refcount of {self.node.describe()} would exceed {self.maximum}",
                    hint="an image with a larger refcount_bits can hold more snapshots",
                )
            self.set_count(cluster, max(value, 0))

    def take(self, clusters: int) -> int:
        """The host offset of contiguous clusters that are free in both states."""
        start, length, cluster = self._hint, 0, self._hint
        while length < clusters:
            block, inside = divmod(cluster, self.entries)
            if self._before(block)[inside] or self.count(cluster):
                start, length = cluster + 1, 0
            else:
                length += 1
            cluster += 1
            if cluster << self.bits > 1 << 56:
                raise NoSpaceError("A qcow2 file cannot be longer than 2^56 bytes", errno=27)
        if clusters == 1 or start == self._hint:
            self._hint = start + clusters
        for taken in range(start, start + clusters):
            self.set_count(taken, 1)
        return start << self.bits

    # ------------------------------------------------------------------------------------ tables

    def write(self, data: bytes) -> int:
        """Put a table into free clusters; its host offset."""
        host = self.take(max(-(-len(data) // self.size), 1))
        self.node.file.write(host, data + bytes(-len(data) % self.size))
        return host

    def l2(self, entry: int) -> array[int]:
        """The L2 table that an L1 entry names."""
        data = self.node.file.read(entry & OFFSET_MASK, self.size)
        return self.node.l2_table.decode(data)

    def each_l2(self, l1: array[int], visit: Callable[[int, int, array[int]], None]) -> None:
        """Call `visit(index, entry, L2 items)` for every L2 table of an L1 table."""
        for index, entry in enumerate(l1):
            if entry & OFFSET_MASK:
                visit(index, entry, self.l2(entry))

    def change_named(self, items: array[int], step: int) -> None:
        """Add `step` for all that the entries of an L2 table name."""
        for entry in items:
            if entry & COMPRESSED:
                unit = self.node._unit(0, entry)
                self.change(unit.host_offset, unit.host_length, step)
            elif entry & OFFSET_MASK:
                self.change(entry & OFFSET_MASK, self.size, step)

    def drop_l1(self, l1: array[int], offset: int) -> None:
        """Forget an L1 table at `offset`, its L2 tables, and what they name."""

        def visit(index: int, entry: int, items: array[int]) -> None:
            self.change(entry & OFFSET_MASK, self.size, -1)
            self.change_named(items, -1)

        self.each_l2(l1, visit)
        self.change(offset, len(l1) * 8, -1)

    def flagged(self, items: array[int]) -> array[int]:
        """The entries with the flag "sole" as the new refcounts have it."""
        made = items[:]
        for at, entry in enumerate(items):
            if entry & COMPRESSED or not entry & OFFSET_MASK:
                continue
            sole = self.count((entry & OFFSET_MASK) >> self.bits) == 1
            made[at] = entry | COPIED if sole else entry & ~COPIED
        return made

    def copy_l1(self, l1: array[int]) -> array[int]:
        """A new L1 table for the active state, with copies of all L2 tables."""
        made = array("Q", bytes(8 * len(l1)))

        def visit(index: int, entry: int, items: array[int]) -> None:
            host = self.write(self.node.l2_table.encode(self.flagged(items)))
            made[index] = host | COPIED

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
        header = self.node.header
        if old_entries:
            self.change(old_offset, old_entries * 8, -1)
        header.l1_size = len(l1)
        header.l1_table_offset = self.write(self.node.l1_slices.encode(l1))

    # ------------------------------------------------------------------------------------ commit

    def commit(self) -> None:
        """Write the refcounts, flush, write the header, flush, and read all anew."""
        node, header = self.node, self.node.header
        if self._new:
            self._write_refcounts()
        node.file.flush()
        node.write_header()
        node.file.flush()
        node.reload()
        del header

    def _write_refcounts(self) -> None:
        """Changed refcount blocks and the table go to new places, which changes them again."""
        header = self.node.header
        self.change(header.refcount_table_offset, header.refcount_table_clusters * self.size, -1)
        last = max(max(self._new), len(self.table) - 1)
        clusters = -(-(last + 2) * 8 // self.size)
        offset = self.take(clusters)
        places: dict[int, int] = {}
        while True:
            waiting = [block for block in self._new if block not in places]
            if not waiting:
                break
            for block in waiting:
                old = self.table[block] & OFFSET_MASK if block < len(self.table) else 0
                if old:
                    self.change(old, self.size, -1)
                places[block] = self.take(1)
        while (max(max(places), len(self.table) - 1) + 1) * 8 > clusters * self.size:
            self._forget(offset, clusters)
            clusters += 1
            offset = self.take(clusters)
            for block in [block for block in self._new if block not in places]:
                places[block] = self.take(1)
        if clusters * self.size > 8 << 20:
            raise NoSpaceError("The refcount table would be longer than 8 MiB", errno=27)
        self._write_blocks(places, offset, clusters)

    def _forget(self, offset: int, clusters: int) -> None:
        for cluster in range(offset >> self.bits, (offset >> self.bits) + clusters):
            self.set_count(cluster, 0)

    def _write_blocks(self, places: dict[int, int], offset: int, clusters: int) -> None:
        node, refcounts = self.node, self.node.refcounts
        table = array("Q", bytes(clusters * self.size))
        table[: len(self.table)] = self.table[: len(table)]
        for block, host in places.items():
            table[block] = host
            counts = self._new[block]
            if refcounts.bits >= 8:
                raw = array(refcounts.blocks.typecode, counts)
            else:
                raw = array("B", bytes(self.size))
                for at, value in enumerate(counts):
                    if value:
                        refcounts._store(raw, at, value)
            node.file.write(host, refcounts.blocks.encode(raw))
        node.file.write(offset, node.l1_slices.encode(table))
        node.header.refcount_table_offset = offset
        node.header.refcount_table_clusters = clusters
