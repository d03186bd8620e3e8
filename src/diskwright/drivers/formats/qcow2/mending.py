"""Repairing an image: what a check decided, written as one Transaction."""

from __future__ import annotations

from array import array

from diskwright.drivers.formats.qcow2.entries import COPIED, OFFSET_MASK, REFTABLE_RESERVED
from diskwright.drivers.formats.qcow2.transaction import Transaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.check import Counter
    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.snapshots import Snapshot


class Mending:
    """What is to be repaired beside the refcounts.

    Attributes:
        entries: (L2 table's host offset, index) -> the entry that it gets.
        flags: L1 indices of the tables in which a flag COPIED is wrong.
        snapshots: the snapshot table, if it has to be written anew.
        old_table_length: bytes of the one that is there.
    """

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self.entries: dict[tuple[int, int], int] = {}
        self.flags: set[int] = set()
        self.snapshots: list[Snapshot] | None = None
        self.old_table_length = 0

    def block_offset(self, block: int) -> int:
        """Where a refcount block is; 0 where there is none that could be."""
        table, size = self.node.refcounts.table, self.node.cluster_size
        entry = table[block] & ~REFTABLE_RESERVED if block < len(table) else 0
        return 0 if entry & (size - 1) or entry >= self.node.file.size else entry

    def apply(self, counter: Counter, fixes: int, *, rebuild: bool) -> None:
        """Write all of it.

        Args:
            counter: the references.
            fixes: 1 leaks, 2 refcounts that are too low, 0 flags only.
            rebuild: the refcount table and all blocks are made anew.
        """
        if not (fixes or self.flags or self.entries or self.snapshots):
            return
        change = Transaction(self.node, rebuild=rebuild and fixes == 3)
        if fixes:
            self._set_counts(change, counter, fixes)
        if self.flags or self.entries:
            self._mend_tables(change)
        if self.snapshots is not None:
            from diskwright.drivers.formats.qcow2 import snapshots

            snapshots.store(change, self.snapshots, self.old_table_length)
        change.commit()

    def _set_counts(self, change: Transaction, counter: Counter, fixes: int) -> None:
        per_block = change.entries // counter.chunk
        last = max(len(change.table) - 1, max(counter.chunks, default=0) // per_block)
        empty = array("I", bytes(4)) * counter.chunk
        for block in range(last + 1):
            wanted = array("I")
            for number in range(block * per_block, (block + 1) * per_block):
                wanted.extend(counter.chunks.get(number, empty))
            have = change.before(block)
            if have == wanted and not change.rebuilds:
                continue
            if fixes == 3:
                if change.rebuilds and not any(wanted):
                    continue
                made = [min(value, change.maximum) for value in wanted]
            else:
                made = [min(one, other) for one, other in zip(have, wanted, strict=True)]
            if made != have.tolist() or change.rebuilds:
                change.changed(block)[:] = array(have.typecode, made)

    def _mend_tables(self, change: Transaction) -> None:
        """New L2 tables where an entry or a flag is wrong, and the L1 table that names them."""
        node, header = self.node, self.node.header
        made = node.active_l1()
        for index, entry in enumerate(made):
            host = entry & OFFSET_MASK
            if not host:
                continue
            mends = [at for place, at in self.entries if place == host]
            if index not in self.flags and not mends:
                continue
            if host & (node.cluster_size - 1) or host >= node.file.size:
                made[index] = entry & ~COPIED
                continue
            items = change.l2(index, entry)
            for at in mends:
                items[at] = self.entries[host, at]
            wanted = change.flagged(items)
            if mends or wanted != change.l2(index, entry):
                change.change(host, node.cluster_size, -1)
                made[index] = change.write(node.l2_table.encode(wanted)) | COPIED
            else:
                sole = change.count(host >> change.bits) == 1
                made[index] = host | (COPIED if sole else 0)
        change.activate(made, header.l1_table_offset, header.l1_size)
