"""Counting references and comparing them with the refcounts.

Every named cluster is counted into one array; then each refcount is held against it: too high
is a leak, too low a corruption. Repair writes the counted values through a Transaction, so it
is whole or not there after a crash.

Memory: four bytes a host cluster, bounded by the file's size.
"""

from __future__ import annotations

from array import array

from diskwright.block.info import CheckResult, Repair
from diskwright.drivers.formats.qcow2.refcounts import OFFSET_MASK
from diskwright.drivers.formats.qcow2.tables import COMPRESSED, COPIED, ZERO_FLAG
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import FormatError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.qcow2.driver import Qcow2

_L1_RESERVED = 0x7F000000000001FF
_L2_RESERVED = 0x3F000000000001FE


class Checker:
    """One check of one image; the caller has the graph to itself."""

    def __init__(self, node: Qcow2, repair: Repair, report: Callable[[str], None]) -> None:
        self.node = node
        self.repair = repair
        self.report = report
        self.result = CheckResult()
        self.bits = node.header.cluster_bits
        self.size = node.cluster_size
        node.file.node.refresh_size()
        self.file_size = node.file.size
        self.clusters = -(-self.file_size // self.size)
        self.counted = array("I", bytes(4 * self.clusters))
        self.last_data = 0
        self.flags: list[tuple[str, int, int, int]] = []  # places whose "sole" flag is wrong

    def run(self) -> CheckResult:
        """Count, compare, and repair what may be repaired."""
        node, header = self.node, self.node.header
        result = self.result
        result.total_clusters = -(-header.size // self.size)
        self.count(0, self.size)
        self._count_l1(header.l1_table_offset, node.l1, active=True)
        for snapshot in self._snapshots():
            l1 = node.read_l1(snapshot[0], snapshot[1])
            self._count_l1(snapshot[0], l1, active=False)
        self.count(header.refcount_table_offset, header.refcount_table_clusters * self.size)
        self._count_blocks()
        self._compare()
        self._check_flags()
        if self.repair != Repair.NONE:
            self._repair()
        return result

    def _snapshots(self) -> list[tuple[int, int]]:
        from diskwright.drivers.formats.qcow2 import snapshots

        header = self.node.header
        try:
            found, length = snapshots.load(self.node)
        except FormatError as error:
            self._corruption(f"ERROR snapshot table: {error.qemu_message}")
            return []
        if length:
            self.count(header.snapshots_offset, length)
        return [(snapshot.l1_offset, snapshot.l1_size) for snapshot in found]

    # --------------------------------------------------------------------------------- counting

    def _corruption(self, text: str) -> None:
        self.result.corruptions += 1
        self.report(text)

    def count(self, offset: int, length: int) -> None:
        """One reference more to every cluster of a host range."""
        if length <= 0:
            return
        if -(-(offset + length) // self.size) > self.clusters + 1 or offset >= 1 << 56:
            self._corruption(
                "ERROR: counting reference for region exceeding the end of the file by one "
                f"cluster or more: offset {offset:#x} size {length:#x}"
            )
            return
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if last >= len(self.counted):
            self.counted.extend([0] * (last + 1 - len(self.counted)))
        for cluster in range(first, last + 1):
            self.counted[cluster] += 1

    def _count_l1(self, offset: int, l1: array[int], *, active: bool) -> None:
        self.count(offset, len(l1) * 8)
        table = self.node.l2_table
        for index, entry in enumerate(l1):
            if not entry:
                continue
            if entry & _L1_RESERVED:
                self._corruption(f"ERROR found L1 entry with reserved bits set: {entry:x}")
            host = entry & OFFSET_MASK
            if not host:
                continue
            self.count(host, self.size)
            if host & (self.size - 1):
                self._corruption(
                    f"ERROR l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted"
                )
                continue
            if host + self.size > self.file_size + self.size:
                continue
            if active:
                self._flag("L1", index, entry, host)
            self._count_l2(table.decode(self.node.file.read(host, self.size)), index, host, active)

    def _flag(self, kind: str, index: int, entry: int, host: int) -> None:
        """Remember a flag to be looked at once the refcounts are known."""
        self.flags.append((kind, index, entry, host >> self.bits))

    def _count_l2(self, items: array[int], index: int, host: int, active: bool) -> None:
        empty = 0
        if items.count(empty) == len(items):
            return
        for at, entry in enumerate(items):
            if not entry:
                continue
            if entry & COMPRESSED:
                self._count_compressed(entry, active)
                continue
            if entry & _L2_RESERVED:
                self._corruption(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            place = entry & OFFSET_MASK
            if not place:
                continue
            if place & (self.size - 1):
                kind = "Preallocated zero cluster" if entry & ZERO_FLAG else "Data cluster"
                self._corruption(
                    f"ERROR offset={place:x}: {kind} is not properly aligned; L2 entry corrupted."
                )
                continue
            if active:
                self._statistics(entry, place)
                self.flags.append(("L2", host + at * 8, entry, place >> self.bits))
            self.count(place, self.size)

    def _count_compressed(self, entry: int, active: bool) -> None:
        unit = self.node._unit(0, entry)
        if entry & COPIED:
            self._corruption(
                f"ERROR: coffset=0x{unit.host_offset:x}: copied flag must never be set for "
                "compressed clusters"
            )
        if active:
            self.result.allocated_clusters += 1
            self.result.compressed_clusters += 1
            # A compressed cluster is never where the one before it ends.
            self.result.fragmented_clusters += 1
        self.count(unit.host_offset & ~511, unit.host_length + (unit.host_offset & 511))

    def _statistics(self, entry: int, place: int) -> None:
        result = self.result
        result.allocated_clusters += 1
        if self.last_data and place != self.last_data:
            result.fragmented_clusters += 1
        self.last_data = place + self.size

    def _count_blocks(self) -> None:
        for index, entry in enumerate(self.node.refcounts.table):
            host = entry & OFFSET_MASK
            if not host:
                continue
            if host & (self.size - 1):
                self._corruption(
                    f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif host >= self.clusters << self.bits:
                self._corruption(f"ERROR refcount block {index} is outside image")
            else:
                self.count(host, self.size)

    # -------------------------------------------------------------------------------- comparing

    def _compare(self) -> None:
        node, result = self.node, self.result
        refcounts, counted = node.refcounts, self.counted
        fix = {
            Repair.NONE: (False, False),
            Repair.LEAKS: (True, False),
            Repair.ALL: (True, True),
        }[self.repair]
        highest = 0
        for block in range(max(len(refcounts.table), -(-len(counted) // refcounts.block_entries))):
            first = block * refcounts.block_entries
            values = self._block(block)
            wanted = counted[first : first + refcounts.block_entries]
            if values is None and not any(wanted):
                continue
            if values is None:
                values = array("Q", bytes(8 * len(wanted)))
            if len(wanted) < len(values):
                wanted.extend([0] * (len(values) - len(wanted)))
            if values.tolist() != wanted.tolist():
                self._differences(first, values, wanted, fix)
            highest = max(highest, self._highest(first, values, wanted))
        result.image_end_offset = (highest + 1) << self.bits

    def _highest(self, first: int, values: array[int], wanted: array[int]) -> int:
        for at in range(len(values) - 1, -1, -1):
            if values[at] or wanted[at]:
                return first + at
        return 0

    def _block(self, block: int) -> array[int] | None:
        refcounts = self.node.refcounts
        host = refcounts.table[block] & OFFSET_MASK if block < len(refcounts.table) else 0
        if not host or host & (self.size - 1) or host >= self.clusters << self.bits:
            return None
        raw = refcounts.blocks.decode(self.node.file.read(host, self.size))
        if refcounts.bits >= 8:
            return array("Q", raw)
        return array("Q", (refcounts._value(raw, at) for at in range(refcounts.block_entries)))

    def _differences(
        self, first: int, values: array[int], wanted: array[int], fix: tuple[bool, bool]
    ) -> None:
        result = self.result
        for at, value in enumerate(values):
            reference = wanted[at]
            if value == reference:
                continue
            leak = value > reference
            repaired = fix[0] if leak else fix[1]
            word = "Repairing" if repaired else "Leaked" if leak else "ERROR"
            self.report(f"{word} cluster {first + at} refcount={value} reference={reference}")
            if leak:
                result.leaks_fixed += repaired
                result.leaks += not repaired
            else:
                result.corruptions_fixed += repaired
                result.corruptions += not repaired

    def _refcount(self, cluster: int) -> int:
        """The refcount as it is, or will be after the repair."""
        if self.repair == Repair.ALL:
            return self.counted[cluster] if cluster < len(self.counted) else 0
        return self._stored(cluster)

    def _stored(self, cluster: int) -> int:
        block, inside = divmod(cluster, self.node.refcounts.block_entries)
        if self._cached[0] != block:
            self._cached = (block, self._block(block))
        values = self._cached[1]
        return 0 if values is None else values[inside]

    _cached: tuple[int, array[int] | None] = (-1, None)

    def _check_flags(self) -> None:
        fixed = self.repair == Repair.ALL
        wrong = []
        for kind, place, entry, cluster in self.flags:
            count = self._refcount(cluster)
            if (count == 1) == (entry >= COPIED):
                continue
            wrong.append((kind, place, entry, cluster))
            word = "Repairing" if fixed else "ERROR"
            if kind == "L1":
                text = f"L2 cluster: l1_index={place} l1_entry={entry:x} refcount={count}"
            else:
                text = f"data cluster: l2_entry={entry:x} refcount={count}"
            self.report(f"{word} OFLAG_COPIED {text}")
            if fixed:
                self.result.corruptions_fixed += 1
            else:
                self.result.corruptions += 1
        self.flags = wrong

    # -------------------------------------------------------------------------------- repairing

    def _repair(self) -> None:
        """Write the counted values; with ALL the flags in the active tables too."""
        node = self.node
        if self.result.check_errors or (self.result.corruptions and self.repair == Repair.ALL):
            raise UnsupportedError(
                f"{node.describe()} has damage that cannot be repaired yet",
                hint="copy what can be read with convert",
            )
        if not (self.result.leaks_fixed or self.result.corruptions_fixed):
            return
        change = Transaction(node)
        for cluster in range(max(len(self.counted), len(node.refcounts.table) * change.entries)):
            wanted = self.counted[cluster] if cluster < len(self.counted) else 0
            have = change.count(cluster)
            if have > wanted or (have < wanted and self.repair == Repair.ALL):
                change.set_count(cluster, wanted)
        if self.flags and self.repair == Repair.ALL:
            header = node.header
            change.activate(change.refresh_l1(node.l1), header.l1_table_offset, header.l1_size)
        change.commit()
