"""Counting references and comparing them with the refcounts, as `qemu-img check` does.

Every named cluster is counted; then each refcount is held against that: too high is a leak,
too low a corruption. What is to be repaired is collected on the way and written at the end
(mending.py). The lines and numbers are QEMU's.

Memory: four bytes a host cluster that is near a named one.
"""

from __future__ import annotations

import errno
from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.block.info import CheckResult, Repair
from diskwright.drivers.formats.qcow2.check_flags import FlagCheck
from diskwright.drivers.formats.qcow2.check_snapshots import SnapshotTableCheck
from diskwright.drivers.formats.qcow2.counter import Counter
from diskwright.drivers.formats.qcow2.data_file import has_data_file
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFTABLE_RESERVED,
    ZERO_FLAG,
    is_empty,
    named,
    runs,
    used_length,
)
from diskwright.drivers.formats.qcow2.entries import number as number_text
from diskwright.drivers.formats.qcow2.header import MAX_L1_BYTES, Incompatible
from diskwright.drivers.formats.qcow2.mending import Mending
from diskwright.errors import FormatError, IOFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.snapshots import Snapshot

#: Counters are kept in pieces of at most this many clusters.
_CHUNK = 1 << 15
#: The last sector of a compressed cluster may be shared.
_SECTORS = 512


class Checker:
    """One check of one image; the caller has the graph to itself."""

    def __init__(self, node: Qcow2, repair: int, report: Callable[[str], None]) -> None:
        self.node = node
        self.repair = repair
        self.report = report
        self.result = CheckResult()
        self.bits = node.header.cluster_bits
        self.size = node.cluster_size
        node.file.node.refresh_size()
        self.file_size = node.file.size
        self.counter = Counter(min(node.refcounts.block_entries, _CHUNK), node.refcounts.maximum)
        self.mending = Mending(node)
        self.rebuild = False
        self._found = 0  # what a repair of the refcounts mends beside the refcounts themselves
        self._next_data = 0
        self._blocks: list[int] = []  # clusters counted because they are refcount blocks
        self._elsewhere = 0  # corruptions found in the snapshot table

    def run(self) -> CheckResult:
        """Count, compare, and repair what may be repaired.

        Raises:
            IOFailure: only a rebuild would help, and it is not allowed.
        """
        result = self.result
        result.total_clusters = -(-self.node.size // self.size)
        table = SnapshotTableCheck(self)
        snapshots = table.load()
        self._elsewhere = result.corruptions
        remaining = self._count_telling(table, snapshots)
        misplaced = self._count_structures()
        table.keep(snapshots)
        leaks, corruptions, errors = self._compare(0)
        if self.rebuild and self.repair == Repair.LEAKS:
            self.report("ERROR need to rebuild refcount structures")
            raise IOFailure(
                "The refcounts can only be rebuilt as a whole", qemu="Input/output error"
            )
        fixes = 0
        if self.rebuild and self.repair == Repair.ALL:
            self.report("Rebuilding refcount structure")
            for line in remaining:  # QEMU counts anew here, and says again what it cannot repair
                self.report(line)
            self._forget_structures()
            result.corruptions -= misplaced
            self._found += misplaced
            fixes = 3
        elif self.repair != Repair.NONE and (
            leaks or corruptions or result.corruptions > self._elsewhere
        ):
            kinds = 3 if self.repair == Repair.ALL else 1
            fixes = kinds if leaks or corruptions else 0
            self._compare(kinds)
        self._tally(leaks, corruptions + self._found, fixes)
        result.check_errors += errors
        FlagCheck(self, fixes).run()
        if self.repair != Repair.NONE:
            self._mend(fixes)
        return result

    def _count_telling(self, table: SnapshotTableCheck, snapshots: list[Snapshot]) -> list[str]:
        """Count; returns the errors that stay, of those that were told."""
        report, lines = self.report, [""]

        def told(line: str) -> None:
            report(line)
            if self.repair == Repair.ALL:
                if line.startswith("Repairing"):  # what the line before is about
                    lines[-1] = ""
                lines.append(line if line.startswith("ERROR") else "")

        self.report = told
        self._count_all(table, snapshots)
        self.report = report
        return [line for line in lines if line]

    @property
    def sound(self) -> bool:
        """Whether nothing wrong is left, as far as found, but for the snapshot table."""
        result = self.result
        wrong = result.corruptions > self._elsewhere
        return not (wrong or result.leaks or result.check_errors)

    def _tally(self, leaks: int, corruptions: int, fixes: int) -> None:
        result = self.result
        result.leaks_fixed += leaks if fixes & 1 else 0
        result.leaks += 0 if fixes & 1 else leaks
        result.corruptions_fixed += corruptions if fixes & 2 else 0
        result.corruptions += 0 if fixes & 2 else corruptions

    def _tell(self, lines: list[str]) -> None:
        for line in lines:
            self.error(line)

    def error(self, line: str) -> None:
        """Report damage that nothing mends."""
        self.result.corruptions += 1
        self.report(line)

    def damage(self, text: str, *, mends: bool = False) -> bool:
        """Report damage; whether it will be mended."""
        if mends and self.repair == Repair.ALL:
            self.result.corruptions_fixed += 1
            self.report(f"Repairing {text}")
            return True
        self.error(f"ERROR {text}")
        return False

    # --------------------------------------------------------------------------------- counting

    def _count_all(self, table: SnapshotTableCheck, snapshots: list[Snapshot]) -> None:
        node, header = self.node, self.node.header
        self.count(0, self.size)
        self._count_l1(header.l1_table_offset, node.active_l1(), active=True)
        if snapshots and has_data_file(header):
            self.error(f"ERROR {len(snapshots)} snapshots in image with data file")
        for snapshot in snapshots:
            info = snapshot.info
            named = f"snapshot {info.id} ({info.name})"
            entry = "snapshot table entry corrupted"
            if snapshot.l1_offset & (self.size - 1):
                place = f"l1_offset={snapshot.l1_offset:#x}"
                self.damage(f"{named} {place}: L1 table is not cluster aligned; {entry}")
            elif snapshot.l1_size * 8 > MAX_L1_BYTES:
                place = f"l1_size={snapshot.l1_size:#x}"
                self.damage(f"{named} {place}: L1 table is too large; {entry}")
            else:
                length = snapshot.l1_size * 8
                self._require_place(
                    snapshot.l1_offset, length, "ERROR: I/O error in check_refcounts_l1"
                )
                l1 = node.read_l1(snapshot.l1_offset, snapshot.l1_size)
                self._count_l1(snapshot.l1_offset, l1, active=False)
        if snapshots:
            table.count()
        self._count_bitmaps()

    def is_allocated(self, cluster: int) -> bool:
        """Whether a cluster of the file has a stored refcount; not, if that cannot be read."""
        number, index = divmod(cluster, self.counter.chunk)
        values = None if self.is_unreadable(number) else self.stored(number)
        return values is not None and cluster << self.bits < self.file_size and values[index] > 0

    def _count_structures(self) -> int:
        """The refcount table and blocks; how much is wrong with places, which a rebuild mends."""
        header, result = self.node.header, self.result
        before = result.corruptions
        self.count(header.refcount_table_offset, header.refcount_table_clusters * self.size)
        self._count_blocks()
        return result.corruptions - before

    def count(self, offset: int, length: int) -> bool:
        """One reference more to every cluster of a host range; whether that may be."""
        if length <= 0:
            return True
        if offset + length - self.file_size >= self.size:
            self.error(
                "ERROR: counting reference for region exceeding the end of the file by one "
                f"cluster or more: offset {offset:#x} size {length:#x}"
            )
            if length <= self.size + _SECTORS:
                self.counter.dangling.update(
                    (offset >> self.bits, (offset + length - 1) >> self.bits)
                )
            return False
        self.add(offset >> self.bits, (offset + length - 1) >> self.bits)
        return True

    def add(self, first: int, last: int) -> None:
        """One reference more to each of the host clusters from `first` to `last`."""
        for cluster in self.counter.add(first, last):
            self.error(
                f"ERROR: overflow cluster offset={cluster << self.bits:#x}\n"
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to "
                "create a clean copy if the image cannot be opened for writing"
            )

    def _count_l1(self, offset: int, l1: array[int], *, active: bool) -> None:
        self.count(offset, len(l1) * 8)
        decode = self.node.l2_table.decode
        for entry in l1:
            if not entry:
                continue
            if entry & L1_RESERVED:
                self.damage(f"found L1 entry with reserved bits set: {entry:x}")
            host = entry & OFFSET_MASK
            self.count(host, self.size)
            if host & (self.size - 1):
                self.damage(f"l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted")
            if host < self.file_size:
                check_cancelled()
                items = decode(self.node.file.read(host, self.size))
                named, wrong = self.node.entries.to_count(items)
                self._count_l2(named, wrong, host, active)
                for at in list(wrong):
                    self._tell(wrong.pop(at))

    def _count_l2(
        self, items: array[int], wrong: dict[int, list[str]], host: int, active: bool
    ) -> None:
        """Count what the entries of a table at `host` name; takes what it told from `wrong`."""
        if is_empty(items):
            return
        self._next_data = 0  # between two tables nothing counts as fragmented
        for index, length in runs(items, self.size):
            entry = items[index]
            for at in [at for at in wrong if at < index]:  # of entries that name nothing
                self._tell(wrong.pop(at))
            if entry & COMPRESSED:
                self._count_compressed(entry, index, wrong.pop(index, []), active)
                continue
            place = entry & OFFSET_MASK
            odd = entry & L2_RESERVED or place & (self.size - 1)
            span = range(index, index + length)
            if odd or self._reaches_out(place, length) or not wrong.keys().isdisjoint(span):
                # Each for itself, since each may have its own line.
                for at in span:
                    self._count_entry(items[at], (host, at), wrong.pop(at, []), active)
            elif place or (self.node.external and entry & COPIED and not entry & ZERO_FLAG):
                if active:
                    self._statistics(place, length)
                if not self.node.external:
                    self.add(place >> self.bits, (place >> self.bits) + length - 1)

    def _reaches_out(self, place: int, length: int) -> bool:
        """Whether data clusters lie behind the end of the file that has them."""
        return not self.node.external and place + (length << self.bits) > self.file_size

    def _count_entry(
        self, entry: int, name: tuple[int, int], wrong: list[str], active: bool
    ) -> None:
        if name in self.mending.zeroed:  # of a table that several snapshots have
            return
        if entry & L2_RESERVED:
            self.damage(f"found l2 entry with reserved bits set: {entry:x}")
        self._tell(wrong)
        place = entry & OFFSET_MASK
        external = self.node.external and entry & COPIED and not entry & ZERO_FLAG
        if not place and not external:
            return
        if place & (self.size - 1):
            zero = bool(entry & ZERO_FLAG)
            kind = "Preallocated" if zero else "Data"
            text = f"offset={place:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
            if self.damage(text, mends=zero):
                self.mending.zeroed.add(name)
                return
        if active:
            self._statistics(place, 1)
        if not self.node.external:
            self.count(place, self.size)

    def _count_compressed(self, entry: int, index: int, wrong: list[str], active: bool) -> None:
        host, length = self.node.payload_of(entry)
        if entry & COPIED:
            self.error(
                f"ERROR: coffset=0x{host:x}: copied flag must never be set for compressed clusters"
            )
        if self.node.external:
            text = f"ERROR compressed cluster {index} with data file, entry=0x{entry & ~COPIED:x}"
            wrong = [text]
        if wrong:
            self._tell(wrong)
            return
        if active:
            self.result.allocated_clusters += 1
            self.result.compressed_clusters += 1
            # A compressed cluster is never where the one before it ends.
            self.result.fragmented_clusters += 1
        self.count(host, length)

    def _statistics(self, place: int, length: int) -> None:
        result = self.result
        result.allocated_clusters += length
        if self._next_data and place != self._next_data:
            result.fragmented_clusters += 1
        self._next_data = place + (length << self.bits)

    def _require_place(self, offset: int, length: int, words: str) -> None:
        """Refuse to go on without a table that no file can have: all that it names would be lost.

        Raises:
            IOFailure: it is one.
        """
        if length and offset + length > 1 << 63:
            self.count(offset, length)
            self.report(words)
            raise IOFailure(f"No file has a table at {offset:#x}", errno=errno.EIO)

    def _count_bitmaps(self) -> None:
        from diskwright.drivers.formats.qcow2 import bitmaps

        try:
            for name, offset, length in bitmaps.areas(self.node):
                self._require_place(
                    offset,
                    length,
                    f"Could not read bitmap_table table from image for bitmap '{name}'",
                )
                if not self.count(offset, length) and self.repair == Repair.ALL:
                    self.node.store_anew(name)
        except FormatError as error:
            raise IOFailure(str(error), errno=errno.EINVAL) from error

    def _count_blocks(self) -> None:
        for index, entry in named(self.node.refcounts.table):
            host = entry & ~REFTABLE_RESERVED
            if entry & REFTABLE_RESERVED:
                self._block_damage(f"refcount table entry {index} has reserved bits set")
                continue
            if host & (self.size - 1):
                self._block_damage(
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif host >= self.file_size:
                if self._block_outside(index):
                    self.rebuild = True
            elif host:
                self._blocks.append(host >> self.bits)
                self.count(host, self.size)
                times = self.counter.get(host >> self.bits)
                if times != 1:
                    self._block_damage(f"refcount block {index} refcount={times}")

    def _block_damage(self, text: str) -> None:
        self._found += 1
        self.rebuild = True
        self.report(f"ERROR {text}")

    def _block_outside(self, index: int) -> bool:
        return self.damage(f"refcount block {index} is outside image", mends=True)

    def _forget_structures(self) -> None:
        """In a rebuild the old table and blocks lose their references."""
        header = self.node.header
        before: dict[int, int] = {}
        first = header.refcount_table_offset >> self.bits
        places = list(range(first, first + header.refcount_table_clusters))
        places += self._blocks
        for cluster in places:
            count = self.counter.get(cluster)
            if count and self.counter.drop(cluster):
                before.setdefault(cluster, count)
        for cluster in sorted(before):
            reference = self.counter.get(cluster)
            self.report(
                f"Repairing cluster {cluster} refcount={before[cluster]} reference={reference}"
            )

    # -------------------------------------------------------------------------------- comparing

    def _compare(self, fixes: int) -> tuple[int, int, int]:
        """Hold the refcounts against the references; (leaks, corruptions, errors).

        Args:
            fixes: what the lines say that is being repaired: 1 leaks, 2 corruptions.
        """
        refcounts, counter = self.node.refcounts, self.counter
        found = [0, 0, 0]
        highest = 0
        per_block = refcounts.block_entries // counter.chunk
        clusters = -(-self.file_size >> self.bits)
        end = max(clusters, self._top())
        for number in self._numbers(per_block, end):
            check_cancelled()
            wanted = counter.chunks.get(number)
            first = number * counter.chunk
            values = self.stored(number) if first < end else None
            if self.is_unreadable(number):
                found[2] += self._report_unreadable(number, range(first, clusters))
                continue
            if wanted is None and (values is None or not values.tobytes().strip(b"\0")):
                continue
            if wanted is None:
                wanted = array("I", bytes(4)) * counter.chunk
            if values is None:
                values = array("I", bytes(4)) * counter.chunk
            if first + counter.chunk > clusters:
                values = self._only_inside(values, wanted, clusters - first)
            if values != wanted:
                self._differences(first, values, wanted, (fixes, found))
            used = max(used_length(values), used_length(wanted))
            highest = first + used - 1 if used else highest
        self.result.image_end_offset = (highest + 1) << self.bits
        return found[0], found[1], found[2]

    def _numbers(self, per_block: int, end: int) -> Iterator[int]:
        """The chunks, in order, that something names or that have a refcount block.

        Of a block's chunks behind cluster `end` only the first one, for the block's own sake.
        """
        blocks = {number // per_block for number in self.counter.chunks}
        blocks.update(at for at, _ in named(self.node.refcounts.table))
        for block in sorted(blocks):
            first = block * per_block
            yield first
            yield from range(first + 1, min(first + per_block, -(-end // self.counter.chunk)))

    def is_unreadable(self, number: int) -> bool:
        """Whether a chunk's refcount block lies where none can be read."""
        entry = self._block_entry(number)
        return bool(entry & (self.size - 1)) or entry + self.size > 1 << 63

    def _block_entry(self, number: int) -> int:
        block = number // (self.node.refcounts.block_entries // self.counter.chunk)
        table = self.node.refcounts.table
        return table[block] & ~REFTABLE_RESERVED if block < len(table) else 0

    def _report_unreadable(self, number: int, clusters: range) -> int:
        """Say of each cluster that its refcount cannot be known; how many there are."""
        clusters = clusters[: self.counter.chunk]
        entry = self._block_entry(number)
        if clusters and entry & (self.size - 1):
            block = number // (self.node.refcounts.block_entries // self.counter.chunk)
            self.node.note_corrupt(
                f"Refblock offset {entry:#x} unaligned (reftable index: {number_text(block)})"
            )
        for cluster in clusters:
            self.report(f"Can't get refcount for cluster {cluster}: Input/output error")
        return len(clusters)

    def _top(self) -> int:
        return (max(self.counter.chunks, default=-1) + 1) * self.counter.chunk

    def _only_inside(self, values: array[int], wanted: array[int], stop: int) -> array[int]:
        """What lies behind the file's end is only looked at where something names it."""
        stop = max(stop, 0)
        if is_empty(wanted[stop:]):
            return values[:stop] + array(values.typecode, (0,)) * (len(values) - stop)
        pairs = zip(values[stop:], wanted[stop:], strict=True)
        inside = [value if reference else 0 for value, reference in pairs]
        return values[:stop] + array(values.typecode, inside)

    def stored(self, number: int) -> array[int] | None:
        """The stored refcounts of a chunk."""
        refcounts = self.node.refcounts
        block, part = divmod(number, refcounts.block_entries // self.counter.chunk)
        host = self.mending.block_offset(block)
        if not host:
            return None
        length = self.size * self.counter.chunk // refcounts.block_entries
        raw = self.node.file.read(host + part * length, length)
        return refcounts.width.unpack(refcounts.blocks.decode(raw))

    def _differences(
        self, first: int, values: array[int], wanted: array[int], how: tuple[int, list[int]]
    ) -> None:
        fixes, found = how
        for at, value in enumerate(values):
            reference = wanted[at]
            if value == reference:
                continue
            leak = value > reference
            if not value:
                self.rebuild = True
            repaired = fixes & (1 if leak else 2)
            word = "Repairing" if repaired else "Leaked" if leak else "ERROR"
            self.report(f"{word} cluster {first + at} refcount={value} reference={reference}")
            found[0 if leak else 1] += 1

    # -------------------------------------------------------------------------------- repairing

    def _mend(self, fixes: int) -> None:
        """Write what is right now, and say so in the header if nothing is left."""
        result, header = self.result, self.node.header
        self.mending.apply(self.counter, fixes, rebuild=self.rebuild)
        clean = not (result.corruptions or result.check_errors)
        bits = Incompatible.CORRUPT if clean else 0
        if clean or fixes == 3:
            bits |= Incompatible.DIRTY
        if header.incompatible_features & bits:
            header.incompatible_features &= ~bits
            self.node.write_header()
