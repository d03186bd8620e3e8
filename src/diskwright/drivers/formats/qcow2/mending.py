"""Repairing an image: what a check decided, written down.

Where the refcount structures can stay, they and the tables are written in place, as QEMU
does: nothing of a damaged image is moved to where some dangling entry may point. Each write
makes the image better, so a crash between them leaves it no worse than it was. A rebuild of
the refcount structures is a Transaction.
"""

from __future__ import annotations

from array import array

from diskwright.block.notice import tell
from diskwright.drivers.formats.qcow2.entries import COPIED, OFFSET_MASK, REFTABLE_RESERVED
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import IOFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.qcow2.counter import Counter
    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.snapshots import Snapshot


class Mending:
    """What is to be repaired.

    Attributes:
        zeroed: (L2 table's host offset, index) of entries without data that are to name nothing.
        flags: (L2 table's host offset, index) -> the flag COPIED of the entry.
        l1_flags: L1 index -> the flag COPIED of the entry.
        snapshots: the snapshot table, if it has to be written anew.
        old_table_length: bytes of the one that is there.
        old_table_counted: bytes of it that have references, which are given up.
    """

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self.zeroed: set[tuple[int, int]] = set()
        self.flags: dict[tuple[int, int], int] = {}
        self.l1_flags: dict[int, int] = {}
        self.snapshots: list[Snapshot] | None = None
        self.old_table_length = 0
        self.old_table_counted = 0

    def block_offset(self, block: int) -> int:
        """Where a refcount block is; 0 where there is none that could be."""
        table, size = self.node.refcounts.table, self.node.cluster_size
        entry = table[block] & ~REFTABLE_RESERVED if block < len(table) else 0
        return 0 if entry & (size - 1) or entry >= self.node.file.size else entry

    def patch(self, host: int, items: array[int]) -> None:
        """Make the items of the L2 table at `host` what they will be."""
        words = self.node.entries.words
        for place, index in self.zeroed:
            if place == host:
                entry = slice(index * words, (index + 1) * words)
                items[entry] = self.node.entries.without_room(items[entry])
        for (place, index), flag in self.flags.items():
            if place == host:
                items[index * words] = items[index * words] & ~COPIED | flag

    def apply(self, counter: Counter, fixes: int, *, rebuild: bool) -> None:
        """Write all of it.

        Args:
            counter: the references.
            fixes: 1 leaks, 2 refcounts that are too low, 0 flags only.
            rebuild: the refcount table and all blocks are made anew.
        """
        node = self.node
        if not rebuild:  # which moves what the refcounts' own tables lie over
            self._keep_tables_off()
        tables = self.flags or self.l1_flags or self.zeroed or self.snapshots is not None
        if not (fixes or tables):
            return
        if rebuild and fixes == 3:
            change = Transaction(node, rebuild=True, avoid=counter.dangling)
            self._each_block(counter, fixes, change.replace)
            change.commit()
        elif fixes:
            self._each_block(counter, fixes, self._write_block)
        node.file.flush()
        self._keep_tables_off()
        self._write_l2()
        self._write_l1()
        node.file.flush()
        node.reload()
        if self.snapshots is not None:
            from diskwright.drivers.formats.qcow2 import snapshots

            # The old table may have no references; it must be whole until the new one is named.
            first, length = node.header.snapshots_offset, self.old_table_length
            bits = node.header.cluster_bits
            old = range(first >> bits, -(-(first + length) >> bits))
            change = Transaction(node, avoid=counter.dangling.union(old))
            snapshots.store(change, self.snapshots, self.old_table_counted)
            change.commit()

    def _each_block(
        self, counter: Counter, fixes: int, write: Callable[[int, array[int], array[int]], None]
    ) -> None:
        """Call `write(block, refcounts as they are, as they are to be)` for each block."""
        refcounts = self.node.refcounts
        before = Transaction(self.node).before
        per_block = refcounts.block_entries // counter.chunk
        blocks = {number // per_block for number in counter.chunks}
        blocks.update(block for block, entry in enumerate(refcounts.table) if entry)
        for block in sorted(blocks):
            have = before(block)
            made = have[:]
            for place in range(per_block):
                number, first = block * per_block + place, place * counter.chunk
                part = have[first : first + counter.chunk]
                wanted = counter.chunks.get(number)
                made[first : first + counter.chunk] = self._decided(part, wanted, fixes)
            write(block, have, made)

    def _decided(self, have: array[int], wanted: array[int] | None, fixes: int) -> array[int]:
        """The refcounts of a chunk as they are to be."""
        if wanted is None:
            return array(have.typecode, bytes(len(have) * have.itemsize))
        if fixes == 3:
            maximum = self.node.refcounts.maximum
            return array(have.typecode, [min(value, maximum) for value in wanted])
        return array(have.typecode, map(min, have, wanted))

    def _write_block(self, block: int, have: array[int], made: array[int]) -> None:
        host = self.block_offset(block)
        if host and have.tobytes() != made.tobytes():
            refcounts = self.node.refcounts
            self.node.file.write(host, refcounts.blocks.encode(refcounts.width.pack(made)))

    def _l2_places(self) -> list[int]:
        """The L2 tables that have to be written."""
        return sorted({place for place, _ in [*self.zeroed, *self.flags]})

    def _keep_tables_off(self) -> None:
        """Refuse to write tables that lie over others: it would make the damage worse."""
        self._keep_l1_off()
        for host in self._l2_places():
            self._keep_off(host)

    def _write_l2(self) -> None:
        node = self.node
        for host in self._l2_places():
            items = node.l2_table.decode(node.file.read(host, node.cluster_size))
            self.patch(host, items)
            node.file.write(host, node.l2_table.encode(items))

    def _keep_off(self, host: int) -> None:
        """Refuse to write an L2 table that lies over other metadata."""
        name = self.node.other_metadata(host, self.node.cluster_size)
        if name is None:
            return
        try:
            self.node.corrupt(f"Preventing invalid write on metadata (overlaps with {name})")
        except IOFailure:
            tell(
                "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error"
            )
            raise

    def _keep_l1_off(self) -> None:
        """Refuse to write entries of an L1 table that lies over other tables."""
        if not self.l1_flags:
            return
        header, size = self.node.header, self.node.cluster_size
        start, length = header.l1_table_offset, header.l1_size * 8
        place = range(start, start + length, size)
        name = self.node.other_metadata(start, length, but="active L1 table")
        if name is None and any(entry & OFFSET_MASK in place for entry in self.node.active_l1()):
            name = "active L2 table"
        if name is not None:
            self.node.corrupt(f"Preventing invalid write on metadata (overlaps with {name})")

    def _write_l1(self) -> None:
        node, offset = self.node, self.node.header.l1_table_offset
        l1 = node.active_l1()
        for index, flag in self.l1_flags.items():
            entry = array("Q", [l1[index] & ~COPIED | flag])
            node.file.write(offset + index * 8, node.l1_slices.encode(entry))
