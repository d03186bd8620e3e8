"""Standard L2 entries, a word each: what they say of clusters, and how they change.

Source: QEMU, docs/interop/qcow2.txt, "Cluster mapping", "Standard Cluster Descriptor".
"""

from __future__ import annotations

from array import array

from diskwright.block.extent import DATA, UNALLOCATED, ZERO
from diskwright.block.mapped import TO_BACKING, TO_ZERO, Allocation, Freed, Place, Run
from diskwright.block.record import Record
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    WITHOUT_COPIED,
    ZERO_FLAG,
    is_empty,
    run_length,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.block.table_cache import Slice
    from diskwright.drivers.formats.qcow2.entries import Rest
    from diskwright.drivers.formats.qcow2.tables import Qcow2Tables


class Pending(Record):
    """What `publish` needs of an allocation: the L2 slice, first entry, its cluster's offset."""

    __slots__ = ("encoded", "host", "index", "reused", "slice")

    def __init__(
        self, slice_: Slice, index: int, host: int, *, reused: bool = False, encoded: int = 0
    ) -> None:
        self.slice = slice_
        self.index = index
        self.host = host
        self.reused = reused  # the entry names the cluster already
        self.encoded = encoded  # the entry of a compressed cluster


class StandardL2:
    """The entries of one image's L2 tables. A slice's `items` has `words` words an entry.

    Attributes:
        words: 64-bit words of an entry.
        unit_bits: the smallest piece whose state an entry tells has 2 to the power of this bytes.
    """

    words = 1

    def __init__(self, node: Qcow2Tables) -> None:
        self.node = node
        self.bits = self.unit_bits = node.header.cluster_bits
        self.size = node.header.cluster_size
        self.mask = self.size - 1

    @property
    def three(self) -> bool:
        """Whether there are zero clusters; `amend` changes it."""
        return self.node.header.version >= 3

    def descriptors(self, items: array[int]) -> array[int]:
        """The word of each entry that names a cluster; to be looked at only."""
        return items

    def with_descriptors(self, items: array[int], descriptors: array[int]) -> array[int]:
        """The items with other words that name clusters."""
        return descriptors

    def without_room(self, items: array[int]) -> array[int]:
        """An entry without data, whose room is lost: it names nothing and reads as before."""
        return array("Q", [ZERO_FLAG])

    def to_count(self, items: array[int]) -> tuple[array[int], dict[int, list[str]]]:
        """(the descriptors of a whole table, index -> what is wrong with one), for a check.

        They have the flag of zero clusters where the entry reserves room and has no data in it.
        What is wrong are things that descriptors alone cannot say.
        """
        return items, {}

    def within_disk(self, offset: int, length: int) -> int:
        """How much of a range is filled: a data file is not longer than the disk.

        But for a machine's state, which lies behind the disk.
        """
        inside = self.node.size - offset
        return min(length, inside) if self.node.external and inside > 0 else length

    def is_owned(self, entry: int) -> bool:
        """Whether the entry names a plain cluster that nothing else names."""
        if entry < COPIED or entry & COMPRESSED:
            return False
        return self.node.external or entry & OFFSET_MASK != 0

    # ------------------------------------------------------------------------------- mapping

    def run(
        self, found: Slice, state: array[int], where: tuple[int, int], *, within: int, write: bool
    ) -> Run:
        """The run that begins `within` bytes inside of a guest cluster, which is not compressed.

        Args:
            found: the slice with the cluster's entry.
            state: the entry's words as they were at one moment. Nothing may look at them again:
                another thread could have changed them, and two looks see two clusters.
            where: the cluster's number, and the index in the slice before which the run ends.
            within: in bytes.
            write: see `MappedBase.map`.
        """
        cluster, stop = where
        entry, rest = state[0], (found.items, (cluster & self.node.slice_mask) + 1, stop)
        host = entry & OFFSET_MASK
        if self.node.external:
            self.node.require_same(cluster, entry)
        if host & self.mask:
            self.node.unaligned(cluster, host, write=write, zero=bool(entry & ZERO_FLAG))
        if entry & ZERO_FLAG and self.three:
            return self._run_of_zeroes(entry, rest, within)
        empty = self.node.empty_mask
        if not entry & empty:
            return self._run_of_nothing(entry, rest, within)
        return self._run_of_data(entry, rest, within=within, write=write)

    def _run_of_nothing(self, entry: int, rest: Rest, within: int) -> Run:
        items, following, stop = rest
        empty = self.node.empty_mask
        count = run_length(entry, rest, 0)
        while following + count <= stop and not items[following + count - 1] & empty:
            count += 1
        return Run(UNALLOCATED, (count << self.bits) - within)

    def _run_of_zeroes(self, entry: int, rest: Rest, within: int) -> Run:
        host = entry & OFFSET_MASK
        count = run_length(entry, rest, self.size if host else 0)
        length = (count << self.bits) - within
        if host:
            return Run(
                ZERO,
                length,
                child=self.node.data,
                host_offset=host + within,
                reserved=entry >= COPIED,
            )
        return Run(ZERO, length)

    def _run_of_data(self, entry: int, rest: Rest, *, within: int, write: bool) -> Run:
        host = entry & OFFSET_MASK
        count = run_length(entry, rest, self.size)
        writable = entry >= COPIED
        if write and writable:
            self.node.guard_data(host, count << self.bits)
        length = (count << self.bits) - within
        child = self.node.data
        return Run(DATA, length, child=child, host_offset=host + within, writable=writable)

    # ---------------------------------------------------------------------------- allocation

    def allocate(self, found: Slice, offset: int, length: int) -> Allocation:
        """See `MappedBase.allocate`: contiguous clusters inside of one L2 slice."""
        node = self.node
        index = offset >> self.bits & node.slice_mask
        count = min(length >> self.bits, len(found.items) - index)
        entry = found.items[index]
        if self.is_owned(entry) and entry & ZERO_FLAG:
            return self._reuse(offset, found, index, count)
        before = node.virgin
        host = node.take_data(offset, count)
        length = self.within_disk(offset, count << self.bits)
        place = Place(
            offset, length, node.data, host_offset=host, zeroed=node.is_virgin(host, before)
        )
        token = Pending(found, index, host, reused=node.external)
        return Allocation(offset, length, [place], token=token)

    def _reuse(self, offset: int, found: Slice, index: int, count: int) -> Allocation:
        """The space of preallocated zero clusters; what it holds is unknown."""
        items = found.items
        host = items[index] & OFFSET_MASK
        used, expected = 1, items[index] + self.size
        while used < count and items[index + used] == expected:
            used += 1
            expected += self.size
        self.node.guard_data(host, used << self.bits)
        length = self.within_disk(offset, used << self.bits)
        place = Place(offset, length, self.node.data, host_offset=host)
        return Allocation(offset, length, [place], token=Pending(found, index, host, reused=True))

    def linked(self, host: int, count: int, *, filled: bool = True) -> array[int]:
        """The items of `count` entries that name contiguous clusters from `host` on.

        `filled`: they have data there; where False an entry may say that room is reserved only.
        """
        named = host | COPIED
        return array("Q", range(named, named + (count << self.bits), self.size))

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See `MappedBase.publish`."""
        pending = allocation.token
        assert isinstance(pending, Pending)
        items = pending.slice.items
        if pending.encoded:
            first, made = pending.index, array("Q", [pending.encoded])
        else:
            skip = (start - allocation.offset) >> self.bits
            first = pending.index + skip
            count = -(-(stop - start) >> self.bits)
            made = self.linked(pending.host + (skip << self.bits), count)
        last = first + len(made)
        freed = [] if pending.reused else self.node.freed(items[first:last], pending.slice)
        items[first:last] = made
        pending.slice.dirty()
        return freed

    # ----------------------------------------------------------------------------- unmapping

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """See `MappedBase.unmap`. Version 2 has no zero clusters."""
        node, bits = self.node, self.bits
        shows = node.backing is not None
        if not self.three and shows and to != TO_BACKING:
            return 0, ()
        zeroes = self.three and to != TO_BACKING
        cluster = offset >> bits
        stop = (offset + length + self.mask) >> bits
        # What was never written is made a zero cluster where QEMU makes it one too.
        fills = zeroes and (shows or to == TO_ZERO)
        if not fills and not node.has_l2(cluster):
            end = min((cluster // node.per_l2 + 1) * node.per_l2, stop)
            return min((end << bits) - offset, length), ()
        found = node.own_l2_slice(cluster)
        first = cluster & node.slice_mask
        last = min(first + stop - cluster, len(found.items) // self.words)
        spares = node.settings.keeps_space and to != TO_BACKING
        keeps = ((keep and to == TO_ZERO) or spares) and zeroes
        part = found.items[first * self.words : last * self.words]
        made = self._unmapped(part, zeroes=zeroes, fills=fills, keeps=keeps)
        freed: list[Freed] = []
        if made != part:
            named = self.descriptors(part)
            freed = node.freed_but_kept(named, found) if keeps else node.freed(named, found)
            if keeps and not keep:
                freed += node.emptied(named)
            found.items[first * self.words : last * self.words] = made
            found.dirty()
        return min((last - first << bits) - (offset & self.mask), length), freed

    def _unmapped(self, part: array[int], *, zeroes: bool, fills: bool, keeps: bool) -> array[int]:
        """The items that replace `part`.

        Args:
            part: whole entries.
            zeroes: they read as zero from now on.
            fills: also those that were empty.
            keeps: the space of plain clusters stays allocated.
        """
        target = ZERO_FLAG if zeroes else 0
        if is_empty(part):
            return array("Q", [target if fills else 0]) * len(part)
        if not keeps:
            if fills or not target:
                return array("Q", [target]) * len(part)
            return array("Q", [target if entry else 0 for entry in part])
        return array(
            "Q",
            [
                entry & ~WITHOUT_COPIED | entry & OFFSET_MASK | target
                if entry & OFFSET_MASK and not entry & COMPRESSED
                else target
                for entry in part
            ],
        )
